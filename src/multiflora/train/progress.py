"""What a person sees while a model trains: one bar, and one line for each entry of the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["ProgressBar", "log_line", "progress_bar"]


class ProgressBar(TrainerCallback):
    """Shows steps, loss, tokens per second and the time left on stderr."""

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
        """Print the line, and put its figures beside the bar."""
        if self._bar is None or not logs or "loss" not in logs:
            return
        figures = f"loss {logs['loss']:.3f}"
        if "tokens_per_second" in logs:
            figures += f" · {logs['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._bar, figures=figures)
        self._progress.console.print(log_line(state.global_step, logs), highlight=False, markup=False, soft_wrap=True)


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """Write one entry of the log as a line of text.

    Example:
        >>> log_line(10, {"loss": 1.5, "loss/sst2": 0.25, "loss/gsm8k": 1.75, "tokens_per_second": 1234.5})
        'step 10  loss 1.500  (sst2 0.250, gsm8k 1.750)  1,234 tokens/s'
    """
    by_task = [f"{key[5:]} {value:.3f}" for key, value in logs.items() if key.startswith("loss/")]
    parts = [f"step {step}", f"loss {logs['loss']:.3f}"]
    if by_task:
        parts.append(f"({', '.join(by_task)})")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[list[TrainerCallback]]:
    """Yield the callbacks that show a training on stderr: one, or none where it shall be quiet.

    Args:
        quiet: Show nothing.
    """
    if quiet:
        yield []
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield [ProgressBar(progress)]
