"""Few-shot prompts: of the training split, the same for a row whatever else is scored, and never the row itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from multiflora.errors import DataError
from multiflora.tasks import Example, Message, load_task
from multiflora.tasks.load import examples_of
from multiflora.tasks.shots import shown_before, with_shots


def spec_of(folder: Path, few_shot: int, train: int = 12, **changes: Any) -> Any:
    for split, size in (("train", train), ("test", 6)):
        rows = [{"prompt": f"{split} {i} ->", "completion": f" {i % 3}", "answer": str(i % 3)} for i in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task({"name": "t", "source": str(folder), "few_shot": few_shot, **changes})


def test_solved_training_rows_stand_before_each_row(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 3)
    scored = with_shots(spec, examples_of(spec, "test"))
    known = {f"train {i} -> {i % 3}" for i in range(12)}  # a tenth is cut off for validation
    for i, example in enumerate(scored):
        *shots, asked = example.prompt.split("\n\n")
        assert asked == f"test {i} ->"
        assert len(set(shots)) == 3
        assert set(shots) <= known
        assert example.completion == f" {i % 3}"
    assert len({example.prompt.rpartition("\n\n")[0] for example in scored}) > 1


def test_a_rows_examples_do_not_depend_on_the_others_and_follow_the_seed(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 2)
    every = {example.id: example.prompt for example in with_shots(spec, examples_of(spec, "test"))}
    few = {example.id: example.prompt for example in with_shots(spec, examples_of(spec, "test", 2))}
    assert few.items() <= every.items()
    other = spec_of(tmp_path, 2, split_seed=1)
    assert {example.id: example.prompt for example in with_shots(other, examples_of(other, "test"))} != every


def test_a_row_is_never_shown_itself(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 10)
    for example in with_shots(spec, examples_of(spec, "train")):
        *shots, asked = example.prompt.split("\n\n")
        assert len(shots) == 10
        assert not any(shot.startswith(asked) for shot in shots)


def test_more_examples_than_there_are_is_an_error(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 4, train=3)
    with pytest.raises(DataError, match=r"task t has few_shot: 4, but its training split has 2 rows.*Lower few_shot"):
        with_shots(spec, examples_of(spec, "test"))


def test_without_the_setting_nothing_changes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 0)
    assert with_shots(spec, examples_of(spec, "test")) == examples_of(spec, "test")


def test_in_a_conversation_they_are_earlier_turns_behind_the_one_system_turn() -> None:
    turns = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    shot = Example("t", "t-1", "System: s\nUser: u\nAssistant:", " a", messages=turns)
    asked = shown_before(Example("t", "t-2", "p", " c", messages=(turns[0], Message("user", "v"), turns[2])), [shot])
    assert [turn.content for turn in asked.messages] == ["s", "u", "a", "v", "a"]
    plain = shown_before(Example("t", "t-2", "p", " c"), [Example("t", "t-1", "q", " b")])
    assert [(turn.role, turn.content) for turn in plain.messages] == [
        ("user", "q"),
        ("assistant", "b"),
        ("user", "p"),
        ("assistant", "c"),
    ]
