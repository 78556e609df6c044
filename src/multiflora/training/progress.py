"""What a person sees while a model trains: in a terminal a table that stays in place, elsewhere lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["LiveView", "log_line", "progress_bar", "routing_line", "score_line", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 24
_NAME = 12
"""Cells of a task's name that are always shown."""
_FIGURES = 22
"""Cells of the two columns of numbers, and of what lies between the columns."""
_AROUND = 8
"""Lines of a terminal that are not tasks: the bar, the heading, the sum, the routing, and room for what was above. The
scores on the way are one more, as soon as there are any."""


class LiveView(Progress):
    """A bar over a table: each task's loss, how it came there, the latest scores and the routers' health."""

    def __init__(self, console: Console) -> None:
        self.history: dict[str, list[float]] = {}
        self.scores = ""
        self.routing = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        # the table is the record of the run, so it stays on the screen when the run is over
        super().__init__(*columns, console=console, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and below it whatever is known already."""
        yield self.make_tasks_table(self.tasks)
        if self.history:
            yield self._losses()
        if self.scores:
            yield Text(self.scores, style="cyan", no_wrap=True, overflow="ellipsis")
        if self.routing:
            yield Text(self.routing, style="yellow" if "dead" in self.routing else "dim")

    def add(self, logs: Mapping[str, Any]) -> None:
        """Take an entry of the log."""
        for key, value in logs.items():
            if key.partition("/")[0] in ("loss", "reward"):
                self.history.setdefault(key, []).append(float(value))
        self.routing = routing_line(logs)
        self.refresh()

    def _losses(self) -> Table:
        """Every task's loss, the sum of all first and then the highest first; what does not fit is counted."""
        room = max(1, self.console.height - _AROUND - bool(self.scores))
        # where answers are rewarded, the loss says little and the reward all
        kind = "reward" if "reward" in self.history else "loss"
        tasks = [key for key in self.history if key.startswith(f"{kind}/")]
        names = sorted(tasks, key=lambda key: -self.history[key][-1])
        table = Table(box=None, pad_edge=False, expand=False)
        # a narrow terminal has shorter curves: a number that is cut says nothing
        left = self.console.width - _NAME - _FIGURES
        points = min(_POINTS, max(1, left))
        table.add_column("task", max_width=_NAME + max(0, left - points), no_wrap=True, overflow="ellipsis")
        for heading in (kind, "change"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, style="cyan")
        for key in [kind, *names[:room]]:
            if key in self.history:
                past = self.history[key]
                name = key.partition("/")[2] or "all tasks"
                change = f"{past[-1] - past[0]:+.3f}" if len(past) > 1 else ""
                table.add_row(
                    Text(name),
                    f"{past[-1]:.3f}",
                    change,
                    sparkline(past[-points:]),
                    style="bold" if key == kind else "",
                )
        if len(names) > room:
            table.add_row(Text(f"and {len(names) - room} lower", style="dim"))
        return table


class ProgressBar(TrainerCallback):
    """Feeds the steps and the log of a training to the screen."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the bar, at the step a resumed run starts from."""
        self._bar = self._progress.add_task("Training", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._progress.update(self._bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show an entry of the log."""
        if self._bar is None or not logs:
            return
        scored = score_line(state.global_step, logs)
        if scored and isinstance(self._progress, LiveView):
            self._progress.scores = scored
            self._progress.refresh()
        elif scored:
            self._progress.console.print(scored, highlight=False, markup=False, soft_wrap=True)
        if "loss" not in logs:
            return
        if "tokens_per_second" in logs:
            self._progress.update(self._bar, figures=f"{logs['tokens_per_second']:,.0f} tokens/s")
        if isinstance(self._progress, LiveView):
            self._progress.add(logs)
        else:
            line = log_line(state.global_step, logs)
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """Write one entry of the log as a line of text.

    Example:
        >>> log_line(10, {"loss": 1.5, "loss/sst2": 0.25, "loss/gsm8k": 1.75, "tokens_per_second": 1234.5})
        'step 10  loss 1.500  (sst2 0.250, gsm8k 1.750)  1,234 tokens/s'
    """
    parts = [f"step {step}", *(part for kind in _SHOWN if (part := _of_kind(kind, logs)))]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if routing_line(logs):
        parts.append(routing_line(logs))
    return "  ".join(parts)


_SHOWN = ("loss", "reward", "length", "kl", "accuracy")


def _of_kind(kind: str, logs: Mapping[str, Any]) -> str:
    """One figure of the log, of all tasks and of each; empty where it is not there."""
    by_task = [f"{key[len(kind) + 1 :]} {value:.3f}" for key, value in logs.items() if key.startswith(f"{kind}/")]
    whole = [f"{kind} {logs[kind]:.3f}"] if kind in logs else []
    return "  ".join([*whole, *([f"({', '.join(by_task)})"] if by_task else [])])


def score_line(step: int, logs: Mapping[str, Any]) -> str:
    """Write scores on the way as a line of text; empty where an entry of the log holds none.

    Example:
        >>> score_line(40, {"validation/macro": 0.625, "validation/sst2": 0.75, "validation/gsm8k": 0.5})
        'step 40  validation scores 0.625  (sst2 0.750, gsm8k 0.500)'
    """
    split = next((split for split in ("validation", "test") if any(key.startswith(f"{split}/") for key in logs)), "")
    if not split:
        return ""
    found = {key.partition("/")[2]: f"{value:.3f}" for key, value in logs.items()}
    macro = found.pop("macro", "")
    by_task = ", ".join(f"{task} {score}" for task, score in found.items())
    return "  ".join(part for part in (f"step {step}", f"{split} scores {macro}".rstrip(), f"({by_task})") if part)


def routing_line(logs: Mapping[str, Any]) -> str:
    """Say in one line how the routers fare; empty for a method without gates.

    Example:
        >>> log = {"routing/entropy": 0.97, "routing/least_load": 0.8, "routing/most_load": 1.25}
        >>> routing_line({**log, "routing/dead_heads": 0.0})
        'gates 97 % undecided, heads carry 0.80 to 1.25 of an equal load'
    """
    if "routing/entropy" not in logs:
        return ""
    dead = int(logs["routing/dead_heads"])
    told = f", {dead} dead" if dead else ""
    return (
        f"gates {logs['routing/entropy']:.0%} undecided, heads carry ".replace("%", " %")
        + f"{logs['routing/least_load']:.2f} to {logs['routing/most_load']:.2f} of an equal load{told}"
    )


def sparkline(values: list[float]) -> str:
    """Draw the latest values as bars between their own least and most.

    Example:
        >>> sparkline([3.0, 2.0, 1.0, 1.0])
        '█▅▁▁'
    """
    shown = [value for value in values[-_POINTS:] if value == value]  # one that is no number has no height
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[list[TrainerCallback]]:
    """Yield the callbacks that show a training on stderr: one, or none where it shall be quiet.

    Args:
        quiet: Show nothing.
    """
    if quiet:
        yield []
        return
    console = Console(stderr=True)
    # outside of a terminal nothing can be drawn over: only lines are written, and no bar
    view = LiveView(console) if console.is_terminal else Progress(console=console, disable=True)
    with view as progress:
        yield [ProgressBar(progress)]
