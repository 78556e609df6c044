"""The study "when do many branches pay?": number of tasks x conflict x budget, eight methods, ten seeds.

    python tools/when.py ../shared/data/tasks/trec ../shared/models/tinylm-1m --output runs/when   # what is missing
    python tools/when.py --page                                                                     # the page anew

The first argument is a folder of question types (TREC: prompt, choices, answer) as JSONL, the second a small causal
language model. The model is first tuned as a whole on the plain questions. Then every condition trains every method
with every seed, codes and rows drawn anew for each; the first seed's validation rows have chosen each method's learning
rate. Stop it as you like: a finished training is a file in the output folder, and a seed that is finished for all
methods is packed into ``docs/results/when/``, where it counts for good; so is each rate that was tried, in ``begun/``,
until all are. Two of these may run side by side (``--part 1/2`` and ``--part 2/2``).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from when_data import NAMES, SPLITS, read_rows, write_tasks

import multiflora
from multiflora.base_model import load_config
from multiflora.comparison.cell import run_cell
from multiflora.comparison.plan import Cell, Competitor, competitors, seed_cell
from multiflora.comparison.search import search_rates, trial_of
from multiflora.comparison.single_task import single_loras, single_trainings, trials_of_sizes
from multiflora.comparison.spec import Comparison, SearchSpec, load_comparison
from multiflora.comparison.tuning import Trial
from multiflora.errors import MultifloraError
from multiflora.files import write_bytes
from multiflora.once import kept

ROOT = Path(__file__).parents[1]
PACKED = ROOT / "docs" / "results" / "when"

TASKS, CONFLICTS, BUDGETS = (2, 4, 8), (0.0, 0.5, 1.0), (8, 32)
SEEDS = tuple(range(10))
METHODS = ("lora", "multilora", "rlora", "hydralora", "mlora", "mtllora", "moelora", "single")
"""``single``: K LoRAs that share the budget, one for each task, each with its share of the steps."""
STEPS, BATCH, SHARES = 300, 16, (0.125, 0.25, 0.5)
BASE = {"max_steps": 400, "batch_size": 16, "learning_rate": 2e-3, "max_length": 128, "bf16": False}
RATES, FACTOR, GROW = (1e-3, 3e-3, 1e-2, 3e-2), 3.0, 3
"""The first learning rates, the step by which the grid grows where a best rate is on its edge, by how many rates."""

_FORMAT = 1
_CODE = ("data", "evaluation", "methods", "ops", "tasks", "training")  # parts of the library that make a cell's numbers


class Condition(NamedTuple):
    """One cell of the design."""

    tasks: int
    conflict: float
    rank: int
    """Of the plain LoRA that sets the budget."""

    @property
    def name(self) -> str:
        """In files."""
        return f"{self.tasks}-tasks-conflict-{self.conflict:g}-rank-{self.rank}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where it reads and writes, and how long it trains."""

    source: Path
    """The questions."""
    model: Path
    output: Path
    packed: Path = PACKED
    steps: int = STEPS
    until: float = float("inf")
    """``time.monotonic()`` after which no training begins."""


class TimeIsUp(Exception):  # noqa: N818 - nothing went wrong
    """The hours are over."""


def conditions() -> list[Condition]:
    """All of them, the corners of the design first: what is stopped early has said the most."""
    every = [Condition(*each) for each in itertools.product(TASKS, CONFLICTS, BUDGETS)]

    def corner(each: Condition) -> int:
        return (each.tasks in (2, 8)) + (each.conflict in (0, 1))

    return sorted(every, key=lambda each: (-corner(each), each.rank, -each.tasks, -each.conflict))


def comparison(each: Condition, seed: int, study: Study, split: str) -> Comparison:
    """The methods at one budget on one seed's tasks, each with as many heads as there are tasks."""
    heads = {"multilora": "num_modules", "moelora": "num_experts"}
    entries: list[dict[str, Any]] = [{"name": "lora", "r": each.rank}]
    entries += [{"name": name, heads.get(name, "num_heads"): each.tasks} for name in METHODS[1:-1]]
    data = study.output / "data" / f"{each.name}-seed-{seed}"
    cells = study.output / "cells" / f"{each.name}-{recipe_digest(each, study)}-{code_digest()}"
    return load_comparison(
        {
            # everywhere the same arithmetic: `auto` is bfloat16 on some machines, and seeds come from several
            "model": {"name": str((study.output / "base").absolute()), "dtype": "float32"},
            "tasks": [{"name": name, "source": str((data / name).absolute())} for name in NAMES[: each.tasks]],
            "train": {
                "max_steps": study.steps,
                "batch_size": BATCH,
                "max_length": 128,
                "loss": "tasks",
                "bf16": False,
                "log_every": study.steps,
            },
            "evaluate": {"batch_size": 60, "split": split, **({"during": SHARES} if split == "test" else {})},
            "compare": {
                "methods": entries,
                "seeds": [seed],
                "shared": {"target_modules": "all-linear"},
                "single_task": True,
            },
            "output": str(cells.absolute()),
        }
    )


def recipe_digest(each: Condition, study: Study) -> str:
    """Tells apart what was trained: everything of the design that a cell's numbers depend on."""
    parts = [each, study.steps, BATCH, SHARES, METHODS, BASE, RATES, FACTOR, GROW, SPLITS]
    return _digest(json.dumps(parts).encode())


def code_digest() -> str:
    """Tells apart what trained it: the sources of the library's parts that make the numbers."""
    home = Path(multiflora.__file__).parent
    files = sorted(path for part in _CODE for path in (home / part).rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return _digest(b"".join(path.read_bytes() for path in files))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:10]


def prepare_base(study: Study) -> None:
    """Tune the whole model on the plain questions, once."""
    folder = study.output / "base"
    if (folder / "README.md").is_file():  # what a run writes last
        return
    if folder.is_dir():
        shutil.rmtree(folder)
    task = {"name": "questions", "source": str(study.source.absolute())}
    recipe = {"method": "full", "tasks": [task], "train": BASE, "output": str(folder)}
    model = {"name": str(study.model), "dtype": "float32"}
    print("the base model ...", flush=True)
    run = multiflora.train({"model": model, **recipe, "evaluate": {"batch_size": 60}}, quiet=True)
    print(f"the base model scores {run.results['adapted']['macro']:.3f}", flush=True)


def run_condition(each: Condition, study: Study, seeds: Sequence[int]) -> None:
    """Train what is missing of a condition, seed by seed, and pack each seed when all its methods are finished."""
    rows = read_rows(study.source)
    found = read_packed(study.packed / f"{each.name}.json.gz")
    if found is None or found["recipe"] != recipe_digest(each, study):
        found = None  # of another design: it is made anew
    for seed in seeds:
        if found is not None and str(seed) in found["seeds"]:
            continue
        prepare_base(study)
        folder = study.output / "data" / f"{each.name}-seed-{seed}"
        write_tasks(folder, rows, seed=seed, tasks=each.tasks, conflict=each.conflict)
        with kept():
            if found is None:
                found = _tuned(each, study, seeds[0])
            found["seeds"][str(seed)] = _seed(each, study, seed, found["methods"])
        write_packed(study.packed / f"{each.name}.json.gz", found)
        shutil.rmtree(folder)
        print(f"{each.name}: seed {seed} packed", flush=True)


def _tuned(each: Condition, study: Study, seed: int) -> dict[str, Any]:
    """A condition without seeds: every method's rank, and its best rate on one seed's validation rows."""
    asked = comparison(each, seed, study, "validation")
    planned = _planned(asked)

    begun = study.packed / "begun" / f"{each.name}.json.gz"
    known = read_packed(begun)
    if known is None or known["recipe"] != recipe_digest(each, study):
        known = {"format": _FORMAT, "recipe": recipe_digest(each, study), "trials": {label: {} for label in METHODS}}

    def tried(grid: Sequence[float]) -> dict[str, list[Trial]]:
        return {label: [trial(label, rate) for rate in grid] for label in METHODS}

    def trial(label: str, rate: float) -> Trial:
        trials = known["trials"][label]
        if repr(rate) not in trials:
            trials[repr(rate)] = _trial(asked, planned[label], label, rate, study)
            write_packed(begun, known)
        return Trial(*trials[repr(rate)])

    # one grid for all methods, as in a comparison
    tunings = search_rates(SearchSpec(factor=FACTOR, grow=GROW), RATES, tried)
    begun.unlink(missing_ok=True)
    return {
        "format": _FORMAT,
        "recipe": recipe_digest(each, study),
        "condition": each._asdict(),
        "steps": study.steps,
        "methods": {
            label: {
                "rank": planned[label].rank,
                "parameters": planned[label].parameters * (each.tasks if label == "single" else 1),
                "rate": tuning.chosen,
                "state": tuning.state,
                "tried": [[trial.rate, trial.score, trial.loss] for trial in tuning.tried],
            }
            for label, tuning in tunings.items()
        },
        "seeds": {},
    }


def _planned(asked: Comparison) -> dict[str, Competitor]:
    """Every method with its rank; of the K LoRAs, one."""
    config = load_config(asked.recipe.model)
    planned = competitors(asked, config)
    single = single_loras(asked, planned, config)["together"]
    return {**{item.label: item for item in planned}, "single": single}


def _trial(asked: Comparison, item: Competitor, label: str, rate: float, study: Study) -> Trial:
    """One rate; K LoRAs are one method."""
    if label == "single":
        singles = single_trainings(asked, {label: item}, {label: rate})
        return trials_of_sizes(singles, {each.cell.name: _run(each.cell, asked, study) for each in singles})[label][0]
    (cell,) = _cells(asked, item, label, rate)
    return trial_of(_run(cell, asked, study))


def _seed(each: Condition, study: Study, seed: int, methods: Mapping[str, Any]) -> dict[str, Any]:
    """All methods with one seed: right or wrong and nats of every test row, and the scores on the way."""
    asked = comparison(each, seed, study, "test")
    planned = _planned(asked)
    found: dict[str, Any] = {"code": code_digest(), "ids": {}, "cells": {}}
    for label in METHODS:
        cells = [_run(cell, asked, study) for cell in _cells(asked, planned[label], label, methods[label]["rate"])]
        if any(not cell["rows"] for cell in cells):
            found["cells"][label] = None  # diverged
            continue
        course: dict[str, dict[str, float]] = {}
        for point in (point for cell in cells for point in cell["course"]):
            own = course.setdefault(f"{point['share']:g}", {})
            own.update({task: score["score"] for task, score in point["scores"]["tasks"].items()})
        rows = {task: rows for cell in cells for task, rows in cell["rows"].items()}
        found["ids"] = {task: own["id"] for task, own in rows.items()}
        found["cells"][label] = {
            "course": course,
            "rows": {task: [int(value) for value in own["score"]] for task, own in rows.items()},
            "nll": {task: [float(f"{value:.4g}") for value in own["nll"]] for task, own in rows.items()},
            "cpu_seconds": round(sum(cell["cpu_seconds"] for cell in cells), 1),
        }
    return found


def _cells(asked: Comparison, item: Competitor, label: str, rate: float) -> list[Cell]:
    """The trainings of a method: one, or one for each task."""
    if label == "single":
        return [each.cell for each in single_trainings(asked, {label: item}, {label: rate})]
    return [seed_cell(asked, item, asked.compare.seeds[0], rate)]


def _run(cell: Cell, asked: Comparison, study: Study) -> dict[str, Any]:
    """One training, or its numbers if it is finished; what it took in CPU seconds stands beside it."""
    folder = asked.recipe.output
    times = folder / "seconds" / f"{cell.name}.json"
    if not times.is_file() and time.monotonic() > study.until:
        raise TimeIsUp
    start = time.process_time()
    # a trial is trained and scored, and neither timed nor looked into; one that diverges says so
    found = run_cell(replace(cell, kind="trial"), folder)
    if not times.is_file():
        times.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(times, json.dumps(time.process_time() - start).encode())
        shutil.rmtree(cell.recipe.output, ignore_errors=True)
    seconds = json.loads(times.read_text("utf-8"))
    print(f"{cell.name}: {seconds:.0f} CPU s, macro {found['scores']['macro']}", flush=True)
    return {**found, "cpu_seconds": seconds}


def read_packed(path: Path) -> dict[str, Any] | None:
    """A condition's cells, or None where there are none."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    if found["format"] != _FORMAT:
        raise SystemExit(f"{path} has format {found['format']}, but this tool reads {_FORMAT}.")
    return found


def write_packed(path: Path, found: Mapping[str, Any]) -> None:
    """The same cells make the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, gzip.compress(json.dumps(found, separators=(",", ":"), sort_keys=True).encode(), mtime=0))


def main() -> None:
    """Read the command line, train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="folder of the questions")
    parser.add_argument("model", type=Path, nargs="?", help="folder of the small model")
    parser.add_argument("--output", type=Path, default=Path("runs/when"))
    parser.add_argument("--only", action="append", metavar="CONDITION", help=", ".join(c.name for c in conditions()))
    parser.add_argument("--part", default="1/1", help="which share of the conditions, to run several side by side")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try it out; then give --packed, too")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no training after so many hours")
    parser.add_argument("--packed", type=Path, default=PACKED, help="where finished seeds are kept")
    parser.add_argument("--page", action="store_true", help="train nothing: write the page from what is packed")
    given = parser.parse_args()
    if not given.page:
        if given.source is None or given.model is None:
            parser.error("expected the folder of the questions and the folder of the model (or --page)")
        if given.steps != STEPS and given.packed == PACKED:
            parser.error(f"--steps {given.steps} is not the study: give another folder as --packed")
        names = [each.name for each in conditions()]
        if unknown := set(given.only or ()) - set(names):
            parser.error(f"no condition {', '.join(sorted(unknown))}; expected one of {', '.join(names)}")
        study = Study(
            source=given.source,
            model=given.model,
            output=given.output,
            packed=given.packed,
            steps=given.steps,
            until=time.monotonic() + 3600 * given.hours,
        )
        number, of = (int(part) for part in given.part.split("/"))
        wanted = [each for each in conditions() if not given.only or each.name in given.only][number - 1 :: of]
        try:
            for each in wanted:
                run_condition(each, study, SEEDS[: given.seeds])
        except TimeIsUp:
            print(f"{given.hours:g} hours are over; the same command goes on", flush=True)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on") from None
        except MultifloraError as error:
            raise SystemExit(f"{error}") from error
    if given.page:
        from when_page import write_pages

        write_pages(given.packed)


if __name__ == "__main__":
    main()
