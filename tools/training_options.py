"""What packing or torch.compile gains a training: the same recipe with and without it, side by side.

python tools/training_options.py packing torch.compile --tasks FOLDER [--rounds 5] [--steps 6]

FOLDER holds sst2, trec, agnews and commonsenseqa; without it four generated tasks are trained on. Prints a table for
docs/decisions/0018-options-around-training.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from multiflora.base_model import load_model, load_tokenizer
from multiflora.bench.plan import GENERATED_TASKS, TASKS
from multiflora.bench.stats import median, ratio, total
from multiflora.bench.timing import Phases, interleave, samples, stopwatch, threads
from multiflora.data.prepare import encode_tasks
from multiflora.recipe import recipe_from
from multiflora.training.adapter import add_adapter
from multiflora.training.fit import fit
from multiflora.training.precision import weights_of
from multiflora.training.quiet import quiet_libraries

VARIANTS = ("packing", "torch.compile")
CPU = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    tasks = [str(given.tasks.absolute() / name) for name in TASKS] if given.tasks else list(GENERATED_TASKS)
    with TemporaryDirectory() as folder, threads(1):
        settings = {
            "model": "embedded",
            "method": {"name": "rlora", "r": 8, "num_heads": 5},
            "tasks": tasks,
            "train": {"max_steps": given.steps, "batch_size": given.batch_size},
            "output": folder,
        }
        measure(settings, ["plain", *given.variants], given.rounds)


def measure(settings: dict[str, Any], names: list[str], rounds: int) -> None:
    """Train all variants side by side and print what each takes beside the plain one."""
    first: dict[str, float] = {}

    def runs(name: str) -> Callable[[], Phases]:
        recipe = recipe_from({**settings, "train": {**settings["train"], "packing": name == "packing"}})
        tokenizer = load_tokenizer(recipe.model)
        examples = encode_tasks(recipe, tokenizer)
        model = add_adapter(load_model(recipe.model, weights_of(recipe)), recipe)
        if name == "torch.compile":
            torch._dynamo.config.recompile_limit = 64  # a block is compiled anew for its layers' names
            for block in model.get_base_model().model.layers:
                block.compile(dynamic=True)

        def run() -> Phases:
            lap, started = stopwatch(CPU), time.perf_counter()
            fit(model, tokenizer, recipe, examples, quiet=True)
            first.setdefault(name, time.perf_counter() - started)
            return {"train": lap()}

        return run

    with quiet_libraries():
        timed = samples(interleave({name: runs(name) for name in names}, rounds))
    print("| | seconds | beside plain | first run |\n|---|--:|--:|--:|")
    for name in names:
        spent, plain = total(timed, name, "cpu"), total(timed, "plain", "cpu")
        print(f"| {name} | {median(spent):.2f} | {ratio(spent, plain)} | {first[name]:.1f} s |")


if __name__ == "__main__":
    main()
