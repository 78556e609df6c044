"""Two tasks of one's own, from rows to a table: what `multiflora train` does, from Python.

python examples/own_tasks.py --model embedded --output runs/own-tasks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import multiflora

COLOURS = {"rose": "red", "violet": "blue", "lily": "white", "daffodil": "yellow"}
SEASONS = {"rose": "summer", "violet": "spring", "lily": "summer", "daffodil": "spring"}


def write(path: Path, question: str, answers: dict[str, str]) -> Path:
    """Write one task as JSONL; prompt, completion, choices and answer need no template."""
    choices = sorted({f" {word}" for word in answers.values()})
    places = ["garden", "park", "field", "wood", "valley", "village", "town", "meadow", "yard", "orchard"]
    rows = [
        {
            "prompt": f"{question} the {flower} of the {place}?",
            "completion": f" {answer}",
            "choices": choices,
            "answer": choices.index(f" {answer}"),
        }
        for place in places
        for flower, answer in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def main() -> None:
    """Write two tasks, train one adapter on both, print the scores before and after."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--model", default="embedded")
    words.add_argument("--output", type=Path, default=Path("runs/own-tasks"))
    words.add_argument("--steps", type=int, default=30)
    asked = words.parse_args()

    data = asked.output.with_name(asked.output.name + "-data")
    data.mkdir(parents=True, exist_ok=True)
    run = multiflora.train(
        {
            "model": asked.model,
            "method": {"name": "rlora", "num_heads": 2, "r": 8},
            "tasks": [
                str(write(data / "colours.jsonl", "Which colour has", COLOURS)),
                str(write(data / "seasons.jsonl", "In which season blooms", SEASONS)),
            ],
            "train": {"max_steps": asked.steps, "learning_rate": 1e-3},
            "output": str(asked.output),
        }
    )
    print(run.table())


if __name__ == "__main__":
    main()
