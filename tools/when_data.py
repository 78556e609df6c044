"""The tasks of the study "when do many branches pay?": the same questions under several label codes.

A task asks for the type of a question (six types, TREC). Its code says which word stands for which type. Tasks
*conflict* where their codes differ: at conflict 0 all tasks have the plain code, in which every word means itself; at
conflict c each task's code moves a share c of the words, drawn for that task. The prompt names the code, so that every
method can know which task a row belongs to.

    python tools/when_data.py ../shared/data/tasks/trec runs/when-tasks/8-1 --tasks 8 --conflict 1

writes them as folders of JSONL, for a comparison of your own.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight")
SPLITS = {"train": 1500, "validation": 60, "test": 60}
"""Rows of a task in each split."""


def code(draw: random.Random, types: int, conflict: float) -> list[int]:
    """Which word stands for each type: a permutation that moves a share ``conflict`` of the types, and no other.

    Example:
        >>> code(random.Random(0), 6, 0.0)
        [0, 1, 2, 3, 4, 5]
        >>> sum(word != i for i, word in enumerate(code(random.Random(0), 6, 0.5)))
        3
    """
    moved = draw.sample(range(types), round(conflict * types))
    words = list(range(types))
    while any(words[i] == i for i in moved):
        turned = draw.sample(moved, len(moved))
        for i, word in zip(moved, turned, strict=True):
            words[i] = word
    return words


def codes(seed: int, tasks: int, types: int, conflict: float) -> list[list[int]]:
    """A code for each task, all different where there is conflict; one's tasks are the first of more tasks'."""
    draw, found = random.Random(f"codes {seed}"), []
    while len(found) < tasks:
        one = code(draw, types, conflict)
        if conflict == 0 or one not in found:
            found.append(one)
    return found


def write_tasks(
    folder: Path, rows: Mapping[str, Sequence[Any]], *, seed: int, tasks: int, conflict: float
) -> list[Path]:
    """Write the tasks of one condition and seed, and return their folders.

    Args:
        folder: Where.
        rows: The questions by split, with prompt, choices and answer.
        seed: Of the codes, and of the rows that are drawn.
        tasks: How many.
        conflict: Share of the types for which each task has words of its own.
    """
    written = []
    for name, words in zip(NAMES, codes(seed, tasks, len(rows["train"][0]["choices"]), conflict), strict=False):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        draw = random.Random(f"rows {seed} {name}")
        for split, number in SPLITS.items():
            drawn = draw.sample(list(rows[split]), min(number, len(rows[split])))
            lines = [json.dumps(_under(seed, name, words, row)) for row in drawn]
            (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        written.append(place)
    return written


def _under(seed: int, name: str, words: Sequence[int], row: Any) -> dict[str, Any]:
    answer = words[row["answer"]]
    return {
        "id": f"{seed}-{name}-{row['id']}",  # under another seed's code it is another row
        "prompt": f"Code {name}. {row['prompt']}",
        "completion": row["choices"][answer],
        "choices": row["choices"],
        "answer": answer,
    }


def read_rows(source: Path) -> dict[str, list[Any]]:
    """The questions of every split."""
    return {
        split: [json.loads(line) for line in (source / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the questions")
    parser.add_argument("folder", type=Path, help="where the tasks are written")
    parser.add_argument("--tasks", type=int, choices=range(2, len(NAMES) + 1), required=True)
    parser.add_argument("--conflict", type=float, choices=(0.0, 0.5, 1.0), required=True)
    parser.add_argument("--seed", type=int, default=0, help="of codes and rows")
    given = parser.parse_args()
    write_tasks(given.folder, read_rows(given.source), seed=given.seed, tasks=given.tasks, conflict=given.conflict)
