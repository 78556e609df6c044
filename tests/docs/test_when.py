"""The study of many branches: its label codes, its packed cells, and what its page says of any of them."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import when  # noqa: E402
import when_data  # noqa: E402
import when_page  # noqa: E402
import when_router  # noqa: E402

from multiflora.comparison.spec import load_comparison  # noqa: E402
from multiflora.comparison.tuning import Trial  # noqa: E402
from multiflora.errors import MultifloraError  # noqa: E402

QUESTIONS = [
    {"id": f"q{i}", "prompt": f"Question {i}", "choices": [f" {word}" for word in "abcdef"], "answer": i % 6}
    for i in range(80)
]


@pytest.mark.parametrize(("conflict", "moved"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_codes_are_permutations_that_move_the_share_and_no_more(conflict: float, moved: int) -> None:
    for seed in range(20):
        found = when_data.codes(seed, 8, 6, conflict)
        assert len(found) == 8
        for words in found:
            assert sorted(words) == list(range(6))
            assert sum(word != i for i, word in enumerate(words)) == moved
        assert len({tuple(words) for words in found}) == (8 if conflict else 1)
    if conflict:
        assert when_data.codes(0, 8, 6, conflict) != when_data.codes(1, 8, 6, conflict)


def test_a_word_never_stands_for_two_types() -> None:
    with pytest.raises(ValueError, match="larger"):
        when_data.code(random.Random(0), 6, 2.0)


def test_rows_are_under_their_code_and_no_seed_has_another_s(tmp_path: Path) -> None:
    rows = dict.fromkeys(when_data.SPLITS, QUESTIONS)
    seen: list[str] = []
    for seed in (0, 1):
        folders = when_data.write_tasks(tmp_path / str(seed), rows, seed=seed, tasks=2, conflict=1.0)
        codes = when_data.codes(seed, 2, 6, 1.0)
        assert [folder.name for folder in folders] == ["one", "two"]
        for folder, words in zip(folders, codes, strict=True):
            for line in (folder / "test.jsonl").read_text("utf-8").splitlines():
                row = json.loads(line)
                plain = next(q for q in QUESTIONS if q["id"] == row["id"].split("-")[-1])
                assert row["answer"] == words[plain["answer"]] != plain["answer"]
                assert row["completion"] == row["choices"][row["answer"]]
                assert row["prompt"] == f"Code {folder.name}. {plain['prompt']}"
                seen.append(row["id"])
    assert len(seen) == len(set(seen)) == 2 * 2 * when_data.SPLITS["test"]


def test_the_corners_come_first_and_all_are_planned() -> None:
    planned = when.conditions()
    assert len(set(planned)) == 18
    assert {(each.tasks, each.conflict) for each in planned[:8]} == {(2, 0), (2, 1), (8, 0), (8, 1)}


GAIN = {"mtllora": 0.3, "moelora": 0.25, "single": 0.1}
"""At the end, where all labels conflict."""


def made(
    each: when.Condition, *, seeds: int = 10, late: float = 1.0, state: str = "tuned", shift: Mapping[str, float] = {}
) -> dict[str, Any]:
    """A condition's packed cells: gains at conflict 1 of which ``late`` is left at the end, and none elsewhere."""
    names = when_data.NAMES[: each.tasks]
    found: dict[str, Any] = {}
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        ability = draw.uniform(size=(each.tasks, 60))
        cells = {}
        for label in when.METHODS:
            gain = (GAIN.get(label, 0.0) if each.conflict == 1 else 0.0) + shift.get(label, 0.0)
            level = 0.4 + (draw.normal(0, 0.02) if gain else 0.0)

            def score(gain: float, level: float = level, ability: Any = ability) -> Any:
                return (ability < level + gain).astype(int)

            cells[label] = {
                "course": {
                    f"{share:g}": {name: float(row.mean()) for name, row in zip(names, score(gain), strict=True)}
                    for share in when.SHARES
                },
                "rows": {name: row.tolist() for name, row in zip(names, score(gain * late), strict=True)},
                "nll": {name: [0.5] * 60 for name in names},
                "cpu_seconds": 30.0,
            }
        found[str(seed)] = {"code": "c0de", "ids": {name: [f"{seed}-{name}-{i}" for i in range(60)] for name in names}}
        found[str(seed)]["cells"] = cells
    method = {"rank": 8, "parameters": 1000, "rate": 0.01, "state": state, "tried": [[0.01, 0.5, 1.0]]}
    study = when.Study(source=Path(), model=Path(), output=Path())
    return {
        "format": 1,
        "recipe": when.recipe_digest(each, study),
        "condition": each._asdict(),
        "steps": 300,
        "methods": dict.fromkeys(when.METHODS, method),
        "seeds": found,
    }


def test_packed_cells_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "one.json.gz"
    cells = made(when.Condition(2, 1.0, 8), seeds=2)
    when.write_packed(path, cells)
    assert when.read_packed(path) == cells
    before = path.read_bytes()
    when.write_packed(path, json.loads(json.dumps(cells)))
    assert path.read_bytes() == before
    assert when.read_packed(tmp_path / "absent.json.gz") is None
    when.write_packed(path, {**cells, "format": 99})
    with pytest.raises(SystemExit, match="format 99"):
        when.read_packed(path)


def test_a_packed_seed_is_not_trained_again_and_another_recipe_s_is(tmp_path: Path) -> None:
    source = tmp_path / "questions"
    source.mkdir()
    for split in when_data.SPLITS:
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
    # there is no model: any training would fail
    study = when.Study(source=source, model=tmp_path / "absent", output=tmp_path / "out", packed=tmp_path / "packed")
    each = when.Condition(2, 1.0, 8)
    path = study.packed / f"{each.name}.json.gz"
    when.write_packed(path, made(each, seeds=2))
    when.run_condition(each, study, (0, 1))
    with pytest.raises(MultifloraError):
        when.run_condition(each, study, (0, 1, 2))
    when.write_packed(path, {**made(each, seeds=2), "recipe": "another"})
    with pytest.raises(MultifloraError):
        when.run_condition(each, study, (0, 1))


def test_a_rate_that_was_tried_counts_elsewhere_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each, tried = when.Condition(2, 1.0, 8), []

    def trial(asked: Any, item: Any, label: str, rate: float, study: when.Study) -> Trial:
        tried.append((label, rate))
        if len(tried) == 20:
            raise when.TimeIsUp
        return Trial(rate, 0, 1 - abs(math.log(rate / 3e-3)), 1.0)

    monkeypatch.setattr(when, "comparison", lambda *given: None)
    planned = dict.fromkeys(when.METHODS, SimpleNamespace(rank=8, parameters=1))
    monkeypatch.setattr(when, "_planned", lambda asked: planned)
    monkeypatch.setattr(when, "_trial", trial)
    words: dict[str, Any] = {"source": Path(), "model": Path(), "packed": tmp_path / "packed"}
    with pytest.raises(when.TimeIsUp):
        when._tuned(each, when.Study(output=tmp_path / "here", **words), 0)
    found = when._tuned(each, when.Study(output=tmp_path / "there", **words), 0)
    assert len(tried) == 1 + len(set(tried)) == 1 + sum(len(method["tried"]) for method in found["methods"].values())
    assert {method["rate"] for method in found["methods"].values()} == {3e-3}
    assert list((tmp_path / "packed" / "begun").iterdir()) == []


def page_of(folder: Path, cells: list[tuple[when.Condition, dict[str, Any]]]) -> tuple[str, str, str]:
    """The study's page, the page of choosing and the picture, from made cells."""
    docs = folder / "docs"
    (docs / "results" / "when").mkdir(parents=True)
    for name in ("choosing.md", "results/when.md"):
        shutil.copy(ROOT / "docs" / name, docs / name)
    for each, packed in cells:
        when.write_packed(folder / "packed" / f"{each.name}.json.gz", packed)
    when_page.write_pages(folder / "packed", docs)
    texts = [(docs / name).read_text("utf-8") for name in ("results/when.md", "choosing.md", "results/when/phases.svg")]
    return texts[0].split("<!-- when: begin -->")[1], texts[1].split("<!-- when: end -->")[0], texts[2]


def test_the_page_of_a_study_that_has_not_run(tmp_path: Path) -> None:
    page, choosing, picture = page_of(tmp_path, [])
    assert "0 of 1,440 planned cells" in page
    assert page.count("Not tested yet") == 3
    assert picture.count(">not run<") == 18
    assert "not run yet" in choosing
    assert "phases.svg" not in choosing


def test_the_page_of_a_study_that_was_stopped(tmp_path: Path) -> None:
    high, low = when.Condition(8, 1.0, 8), when.Condition(2, 1.0, 8)
    page, choosing, picture = page_of(tmp_path, [(high, made(high)), (low, made(low, seeds=3))])
    assert "104 of 1,440 planned cells are there, in 2 of 18 conditions" in page
    assert picture.count(">not run<") == 16
    assert picture.count(">3 of 10 seeds<") == 1
    assert ">MTL-LoRA +29<" in picture
    assert "MTL-LoRA: supported" in page
    assert "From 1 of 6 planned conditions" in page
    assert "**2. At conflict 0 no method is worse than LoRA by two points, and none better.** Not tested yet" in page
    assert "too few seeds" in page
    assert "8 tasks, conflict 1, rank 8: MTL-LoRA, MOELoRA and K LoRAs" in choosing
    assert "2 tasks, conflict 1, rank 8:" not in choosing.split(")", 1)[1]


def test_the_page_of_a_whole_study(tmp_path: Path) -> None:
    page, choosing, picture = page_of(tmp_path, [(each, made(each)) for each in when.conditions()])
    assert "1,440 of 1,440 planned cells" in page
    assert "not run" not in picture + page
    assert picture.count(">undecided<") == 12
    assert page.count("From 6 of 6 planned conditions") == 3
    assert "Within two points of LoRA: MultiLoRA" in page
    assert "MTL-LoRA: refuted, the gain does not shrink by two points" in page
    assert "In 12 conditions no method could be shown to be better" in choosing


def test_a_condition_that_is_looked_at_early_says_so(tmp_path: Path) -> None:
    each = when.Condition(8, 0.0, 8)
    _, choosing, picture = page_of(tmp_path / "early", [(each, made(each, seeds=5))])
    assert ">undecided at 5 seeds<" in picture
    assert "In 1 condition no method could be shown to be better; 1 of them with seeds still to come." in choosing
    _, choosing, picture = page_of(tmp_path / "whole", [(each, made(each))])
    assert ">undecided<" in picture
    assert "In 1 condition no method could be shown to be better. One tiny model" in choosing


def test_a_gain_that_shrinks_is_one_of_speed_and_one_that_is_not_there_is_refuted(tmp_path: Path) -> None:
    page, _, _ = page_of(tmp_path / "speed", [(each, made(each, late=0.4)) for each in when.conditions()])
    assert "MTL-LoRA: supported (gain at half minus gain at the end +1" in page
    page, _, _ = page_of(tmp_path / "none", [(each, made(each, late=0.0)) for each in when.conditions()])
    assert "MTL-LoRA: refuted (" in page.split("**2.")[0]
    worse = {"rlora": -0.1}
    page, _, _ = page_of(tmp_path / "worse", [(each, made(each, shift=worse)) for each in when.conditions()])
    assert "Refuted by R-LoRA (" in page


def test_nothing_is_claimed_of_what_is_not_tuned(tmp_path: Path) -> None:
    cells = [(each, made(each, state="at the edge")) for each in when.conditions()]
    page, choosing, picture = page_of(tmp_path, cells)
    assert page.count("Not tested yet") == 3
    assert "supported" not in page
    assert "MTL-LoRA +" not in picture
    assert "not tuned" in page
    assert "Better than LoRA" not in choosing


def test_a_method_that_diverged_is_said_and_left_out(tmp_path: Path) -> None:
    each = when.Condition(2, 1.0, 8)
    cells = made(each)
    cells["seeds"]["3"]["cells"]["rlora"] = None
    page, _, _ = page_of(tmp_path, [(each, cells)])
    assert "diverged" in page
    assert "| R-LoRA | 8 |" not in page


def test_the_pages_are_as_the_packed_cells_have_them(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "results" / "when").mkdir(parents=True)
    names = ("choosing.md", "results/when.md", "results/when/phases.svg")
    for name in names:
        shutil.copy(ROOT / "docs" / name, docs / name)
    when_page.write_pages(when.PACKED, docs)
    for name in names:
        same = (docs / name).read_text("utf-8") == (ROOT / "docs" / name).read_text("utf-8")
        assert same, f"{name}: run python tools/when.py --page"


def test_information_of_head_and_task() -> None:
    shared = when_router.head_task_information([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    assert shared == pytest.approx(2 / 3)  # I = log 2, H(t) = log 2, H(h) = log 4
    assert when_router.head_task_information([[2.0, 0.0], [0.0, 0.5]]) == pytest.approx(1.0)
    assert when_router.head_task_information([[0.3, 0.7], [0.3, 0.7]]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "results" / "when").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_recipes_are_read(path: Path, tmp_path: Path) -> None:
    """Where their tasks have been written as the page says."""
    root = tmp_path / "project"
    rows = dict.fromkeys(when_data.SPLITS, QUESTIONS)
    for name, tasks, conflict in (("8-1", 8, 1.0), ("8-0", 8, 0.0), ("2-1", 2, 1.0)):
        when_data.write_tasks(root / "runs" / "when-tasks" / name, rows, seed=0, tasks=tasks, conflict=conflict)
    for name in ("sst2", "trec", "agnews", "arc_easy", "commonsenseqa", "rte"):
        shutil.copytree(root / "runs" / "when-tasks" / "2-1" / "one", tmp_path / "shared" / "data" / "tasks" / name)
    place = root / "docs" / "results" / "when"
    place.mkdir(parents=True)
    found = load_comparison(Path(shutil.copy(path, place)))
    assert len(found.compare.seeds) == 5
    assert found.compare.learning_rate is not None
    assert found.recipe.train.max_steps == 300
    assert found.recipe.train.batch_size == 16
