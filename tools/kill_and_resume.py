"""Kill a training at random moments (SIGKILL), resume it, and compare with one that was never interrupted.

    python tools/kill_and_resume.py --runs 20

Every run is killed once and resumed to its end. Its adapter and its logged losses must equal the uninterrupted run's
bit for bit. Where the kill came before the first checkpoint, the run starts anew, as ``--resume`` says it must.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from toy import make_toy

from multiflora.jobs.train import train
from multiflora.recipe import load_recipe
from multiflora.training.checkpoint import last_checkpoint


def main() -> int:
    """Run them all; the exit code is 0 only if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="how many runs to kill")
    parser.add_argument("--steps", type=int, default=9, help="optimiser steps of each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        # a line every two steps and a checkpoint every third: some fall between two lines of the log
        recipe = Path(place) / "toy" / "recipe.yaml"
        # in a process of its own: a thread that a progress bar starts here could hold a lock while a run is forked
        _joined(_fork(_make, recipe.parent, asked.steps))
        whole = Path(place) / "whole"
        start = time.monotonic()
        _joined(_start(recipe, whole, resume=False))
        seconds = time.monotonic() - start
        expected = _outcome(whole)
        print(f"uninterrupted: {seconds:.1f} s, {len(expected['log'])} lines of log", flush=True)
        draw, equal = random.Random(asked.seed), 0
        for number in range(1, asked.runs + 1):
            told, same = _one(recipe, Path(place) / f"run-{number}", seconds, draw, expected)
            equal += same
            print(f"{number} of {asked.runs}: {told}: {'equal' if same else 'DIFFERENT'}", flush=True)
    print(f"{equal} of {asked.runs} equal")
    return 0 if equal == asked.runs else 1


def _one(recipe: Path, output: Path, seconds: float, draw: random.Random, expected: Any) -> tuple[str, bool]:
    """Kill one run and finish it: how that went, and whether it came to the same."""
    while True:
        after = draw.uniform(0, seconds)
        process = _start(recipe, output, resume=False)
        process.join(after)
        process.kill()  # SIGKILL; nothing to a process that has ended
        process.join()
        if not (output / "README.md").exists():
            break
        shutil.rmtree(output)  # it had finished already, its model card being the last file; draw anew
    left = [path.name for path in (output / "checkpoints").glob("checkpoint-*")]
    left.sort(key=lambda name: int(name.rpartition("-")[2]))
    checkpoint = last_checkpoint(output)
    if checkpoint is None:
        shutil.rmtree(output, ignore_errors=True)
    again = _start(recipe, output, resume=checkpoint is not None)
    again.join()
    torn = len(left) - (0 if checkpoint is None else left.index(checkpoint.name) + 1)
    told = f"killed after {after:.2f} s, {'started anew' if checkpoint is None else f'resumed from {checkpoint.name}'}"
    told += f", {torn} unfinished checkpoint passed over" if torn else ""
    if again.exitcode != 0:
        return f"{told}, ended with exit code {again.exitcode}", False
    return told, _outcome(output) == expected


def _start(recipe: Path, output: Path, *, resume: bool) -> multiprocessing.process.BaseProcess:
    """Train in a process of its own; forked, so that it need not import everything again."""
    return _fork(_train, recipe, output, resume)


def _fork(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def _joined(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"The run that is not interrupted ended with exit code {process.exitcode}.")


def _make(folder: Path, steps: int) -> None:
    make_toy(folder, max_steps=steps, save_every=3, log_every=2)


def _train(recipe: Path, output: Path, resume: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train(load_recipe(recipe, [f"output={output}"]), resume=resume, quiet=True)


def _outcome(output: Path) -> dict[str, Any]:
    """What a run came to: every bit of the adapter, and the log."""
    results = output / "results.json"
    return {
        "adapter": (output / "adapter_model.safetensors").read_bytes(),
        "log": json.loads(results.read_text("utf-8"))["training"]["log"] if results.exists() else None,
    }


if __name__ == "__main__":
    raise SystemExit(main())
