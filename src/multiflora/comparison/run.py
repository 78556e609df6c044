"""The comparison: what is missing is run, what is there is read, and all of it is summed up."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multiflora.base_model import load_config
from multiflora.comparison.archive import CELLS, write_archive
from multiflora.comparison.cell import read_cell
from multiflora.comparison.clock import clock_cells, in_time
from multiflora.comparison.devices import Failure, run_cells
from multiflora.comparison.looks import goes_on, read_looks, record_look
from multiflora.comparison.plan import (
    Cell,
    Competitor,
    base_cell,
    plan_of,
    seed_cell,
    trial_cell,
)
from multiflora.comparison.results import Summary
from multiflora.comparison.search import first_rates, search_rates, trial_of
from multiflora.comparison.single_task import (
    single_loras,
    single_trainings,
    single_trials,
    trials_of_sizes,
    with_single_tasks,
)
from multiflora.comparison.spec import COMPARISON, SUMMARY, Comparison, load_comparison
from multiflora.comparison.summary import summarise
from multiflora.comparison.tuning import Trial, Tuning
from multiflora.comparison.words import duration
from multiflora.errors import EnvironmentProblem
from multiflora.files import lock, saving, write_json, write_text
from multiflora.once import kept

__all__ = ["compare"]

log = logging.getLogger(__name__)

Cells = dict[str, dict[str, Any]]

_NEAR = 0.05  # a budget that is missed by more is told of


def compare(
    source: Comparison | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, quiet: bool = False
) -> Summary:
    """Train every method with every seed at one budget, and say what the numbers allow.

    What was finished before, in this process or one that was killed, is not run again: each cell is one file, written
    at once. Start the same comparison anew to go on.

    Args:
        source: The path of a YAML file, a mapping with a recipe's keys and ``compare``, or a `Comparison`.
        overrides: ``key.path=value`` items, e.g. ``compare.seeds=5``.
        quiet: Show no progress.

    Returns:
        The table, the tests and a sentence for each method. The output folder holds it all, and ``multiflora report``
        makes a page of it.

    Raises:
        ConfigError: The comparison has problems.
        EnvironmentProblem: Another process runs the same comparison, or cells failed: all others are finished.

    Example:
        >>> multiflora.compare("compare.yaml").sentences["rlora"]  # doctest: +SKIP
        'No difference to lora could be shown: ...'
    """
    comparison = load_comparison(source, overrides)
    folder = comparison.recipe.output
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), kept():
        planned = plan_of(comparison)
        _tell_of_misses(comparison, planned)
        loras = {}
        if comparison.compare.single_task:  # what cannot be is said before anything is trained
            loras = single_loras(comparison, planned, load_config(comparison.recipe.model))
        # until it is made anew: a summary that is there speaks of the whole comparison, never of an earlier version
        (folder / SUMMARY).unlink(missing_ok=True)
        write_text(folder / COMPARISON, comparison.to_yaml(folder))
        progress = _Progress(comparison, planned, quiet=quiet)
        clocks = _finish(clock_cells(comparison, planned), comparison, progress)
        planned = in_time(comparison, planned, list(clocks.values()))
        tunings = _search(comparison, planned, progress)
        found: Cells = {}
        spec, seen = comparison.compare, 0
        for number in spec.looks() if spec.until else (len(spec.seeds),):
            cells = [] if seen else [base_cell(comparison)]
            # seed by seed, so that a comparison that is stopped early has whole columns
            for seed in spec.more_seeds(number)[seen:]:
                cells += [_seed_cell(comparison, item, seed, tunings) for item in planned]
            progress.expect(number, len(planned))
            found |= _finish(cells, comparison, progress)
            summary = _look(comparison, planned, found, tunings)
            seen = number
            if not spec.until or not goes_on(summary, progress.hours(), spec.max_hours):
                break
        if loras:
            summary = _with_single_tasks(comparison, loras, summary, found, progress)
            write_json(folder / SUMMARY, summary.to_dict())
        return summary


def _seed_cell(comparison: Comparison, item: Competitor, seed: int, tunings: Mapping[str, Tuning]) -> Cell:
    """The method's training with its best rate, where one was searched."""
    return seed_cell(comparison, item, seed, tunings[item.label].chosen if item.label in tunings else None)


def _look(
    comparison: Comparison, planned: Sequence[Competitor], found: Cells, tunings: Mapping[str, Tuning]
) -> Summary:
    """Sum up what is finished, and write it down with all that it is made of."""
    folder, cells = comparison.recipe.output, list(found.values())
    names = [cell["cell"] for cell in cells if cell["kind"] == "seed"]
    taken = read_looks(folder, names)
    summary = summarise(comparison, planned, cells, tunings, taken)
    write_archive(folder / CELLS, comparison, planned, cells, tunings, taken)
    if summary.look is not None:
        record_look(folder, summary.look, summary.seeds, names)
    write_json(folder / SUMMARY, summary.to_dict())
    return summary


def _tell_of_misses(comparison: Comparison, planned: Sequence[Competitor]) -> None:
    """Warn of methods whose nearest rank is not near."""
    budget = comparison.compare.budget
    if budget.equal == "nothing":
        return
    cost = {
        item.label: item.parameters if budget.equal == "parameters" or item.flops is None else item.flops.training
        for item in planned
    }
    target = budget.target or cost[budget.of or comparison.compare.reference()]
    for item in planned:
        if abs(cost[item.label] / target - 1) > _NEAR:
            log.warning(
                "%s comes to %.2f times the budget%s; keep that in mind when you compare it.",
                item.label,
                cost[item.label] / target,
                ", with the nearest rank there is" if item.solved else ", as its rank is given or it has none",
            )


def _search(comparison: Comparison, planned: Sequence[Competitor], progress: _Progress) -> dict[str, Tuning]:
    """Search the learning rate of every method: one grid for all, which grows while a best rate lies on its edge."""
    search = comparison.compare.learning_rate
    if search is None:
        return {}
    seeds = comparison.compare.seeds[: search.seeds]

    def tried(grid: tuple[float, ...]) -> dict[str, list[Trial]]:
        # seed by seed and rate by rate, so that all methods get on alike
        cells = [trial_cell(comparison, item, seed, rate) for seed in seeds for rate in grid for item in planned]
        progress.searches(grid, len(cells))
        found = _finish(cells, comparison, progress)
        trials: dict[str, list[Trial]] = {item.label: [] for item in planned}
        for cell in cells:
            trials[cell.label].append(trial_of(found[cell.name]))
        return trials

    return search_rates(search, first_rates(comparison, planned), tried)


def _with_single_tasks(
    comparison: Comparison, loras: Mapping[str, Competitor], summary: Summary, found: Cells, progress: _Progress
) -> Summary:
    """Train one LoRA for each task, tuned as the methods are, and sum up what training together brings."""
    tunings: dict[str, Tuning] = {}
    if comparison.compare.learning_rate is not None:

        def tried(grid: tuple[float, ...]) -> dict[str, list[Trial]]:
            trials = single_trials(comparison, loras, grid)
            progress.searches(grid, len(trials))
            return trials_of_sizes(trials, _finish([trial.cell for trial in trials], comparison, progress))

        progress.trials = 0  # those of the methods are over
        methods = sorted({trial.rate for row in summary.rows if row.tuning for trial in row.tuning.tried})
        tunings = search_rates(comparison.compare.learning_rate, methods, tried)
    rates = {size: tuning.chosen for size, tuning in tunings.items()}
    singles = single_trainings(comparison, loras, rates)
    progress.total += len(singles)
    done = _finish([single.cell for single in singles], comparison, progress)
    return with_single_tasks(comparison, summary, singles, tunings, found, done)


def _finish(cells: Sequence[Cell], comparison: Comparison, progress: _Progress) -> Cells:
    """Read the finished cells, run the missing ones, and return them all by name, in the order given.

    Raises:
        EnvironmentProblem: Cells failed.
    """
    folder = comparison.recipe.output
    found = {cell.name: read_cell(cell, folder) for cell in cells}
    missing = [cell for cell in cells if found[cell.name] is None]
    progress.found(len(cells) - len(missing))
    failures = []
    for cell, result in run_cells(missing, folder, comparison.compare):
        if isinstance(result, Failure):
            failures.append(result.reason)
            log.error("%s", result.reason)
        else:
            found[cell.name] = result
        progress.finished(cell, found[cell.name])
    if failures:
        listed = "\n".join(f"  - {failure}" for failure in failures)
        raise EnvironmentProblem(
            f"{len(failures)} of {len(cells)} cells could not be finished; all others are, in {folder}. Mend the cause "
            f"and start the same comparison again: only these will run.\n{listed}"
        )
    return {name: cell for name, cell in found.items() if cell is not None}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process from running the same cells. The system lets go of the lock when the process ends."""
    path = folder / ".lock"
    with path.open("w") as file:
        if not lock(path, file.fileno()):
            raise EnvironmentProblem(
                f"Another process runs the comparison in {folder}. Wait for it, or choose another output folder; for "
                "several trainings at a time, set compare.devices."
            )
        yield


class _Progress:
    """One line for each cell, with the time that is left."""

    def __init__(self, comparison: Comparison, planned: Sequence[Competitor], *, quiet: bool) -> None:
        self.total = 1 + len(planned) * len(comparison.compare.seeds) + len(clock_cells(comparison, planned))
        self.trials = 0
        self.done = self.ran = 0
        self.seeds = len(comparison.compare.seeds)
        self.start = time.perf_counter()
        self.quiet = quiet

    def searches(self, grid: Sequence[float], trials: int) -> None:
        """Count the trials of a grid that has just been laid out or has grown."""
        self.total += trials - self.trials
        self.done -= self.trials  # those of the smaller grid are met again
        self.trials = trials
        if not self.quiet:
            log.info("Learning rates: %s", ", ".join(f"{rate:.3g}" for rate in grid))

    def expect(self, seeds: int, methods: int) -> None:
        """Count the cells of seeds that were added."""
        self.total += max(seeds - self.seeds, 0) * methods
        self.seeds = max(seeds, self.seeds)

    def hours(self) -> float:
        """How long it has run."""
        return (time.perf_counter() - self.start) / 3600

    def found(self, count: int) -> None:
        """Count cells that were finished before."""
        self.done += count
        if count and not self.quiet:
            log.info("%d of %d cells are finished already", self.done, self.total)

    def finished(self, cell: Cell, found: Mapping[str, Any] | None) -> None:
        """Say what came of a cell."""
        self.done += 1
        self.ran += 1
        if self.quiet:
            return
        left = (time.perf_counter() - self.start) / self.ran * (self.total - self.done)
        macro = found["scores"]["macro"] if found else None
        told = "failed" if found is None else "finished" if macro is None else f"macro {macro:.3f}"
        log.info("%d of %d: %s, %s; about %s left", self.done, self.total, cell.name, told, duration(left))
