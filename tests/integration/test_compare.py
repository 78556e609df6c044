"""A comparison of real trainings: equal budgets, one file a cell, and nothing that is finished runs twice."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import multiflora
from multiflora.comparison.results import Summary
from multiflora.comparison.saved import read_comparison
from multiflora.comparison.single_task import steps_of_each
from multiflora.comparison.transfer import size_words
from multiflora.comparison.tuning import decide
from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.recipe import recipe_from
from multiflora.reports.run import report
from tests.cli.parts import COMMAND, save_model, write_task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    save_model(folder / "model")
    for name in ("roses", "tulips", "lilies"):
        write_task(folder, name)
    return folder


def plan(place: Path, output: str, **section: Any) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "tasks": [str(place / "roses.jsonl"), str(place / "tulips.jsonl")],
        "train": {"max_steps": 2, "batch_size": 4, "max_length": 64, "log_every": 1},
        "evaluate": {"limit": 2, "batch_size": 4, "extra_tasks": [str(place / "lilies.jsonl")]},
        "output": str(place / output),
        "compare": {"methods": [{"lora": {"r": 4}}, {"rlora": {"num_heads": 2}}], "seeds": 2, **section},
    }


@pytest.fixture(scope="module")
def finished(place: Path) -> Summary:
    return multiflora.compare(plan(place, "whole"), quiet=True)


def cells(folder: Path) -> dict[str, tuple[int, str]]:
    """Each cell's file, with the moment it was written."""
    return {path.stem: (path.stat().st_mtime_ns, path.read_text()) for path in (folder / "cells").glob("*.json")}


def test_every_method_is_trained_with_every_seed_at_one_budget(finished: Summary, place: Path) -> None:
    kinds = sorted(re.sub(r"-[0-9a-f]{10}$", "", name) for name in cells(place / "whole"))
    assert kinds == ["base-base0", "lora-seed0", "lora-seed1", "rlora-seed0", "rlora-seed1"]
    lora, rlora = finished.rows
    assert rlora.parameters == pytest.approx(lora.parameters, rel=0.1)
    assert finished.metrics == {"roses": "acc", "tulips": "acc", "lilies": "acc"}
    assert "rlora" in finished.answer


def test_a_cell_holds_all_that_a_comparison_needs(finished: Summary, place: Path) -> None:
    name = next(name for name in cells(place / "whole") if name.startswith("rlora-seed1"))
    cell = json.loads((place / "whole" / "cells" / f"{name}.json").read_text())
    assert cell["parameters"]["trainable"] == finished.rows[1].parameters  # counted, and trained
    assert set(cell["rows"]) == {"roses", "tulips", "lilies"}
    assert len(cell["rows"]["roses"]["id"]) == len(cell["rows"]["roses"]["nll"]) == 2
    assert cell["scores"]["tasks"]["roses"]["score"] == pytest.approx(sum(cell["rows"]["roses"]["score"]) / 2)
    assert cell["seconds"]["train"] > 0
    assert cell["peak_memory_bytes"] > 2**20
    assert cell["latency"]["with"] > 0
    assert [line["step"] for line in cell["log"]] == [1, 2]
    assert (place / "whole" / "runs" / name / "adapter_model.safetensors").is_file()


def test_seeds_and_methods_differ_and_rows_do_not(finished: Summary, place: Path) -> None:
    found = [json.loads(text) for _, text in cells(place / "whole").values()]
    assert len({json.dumps(cell["rows"]["roses"]["nll"]) for cell in found}) == len(found)
    assert len({json.dumps(cell["rows"]["roses"]["id"]) for cell in found}) == 1


def test_started_again_it_runs_nothing_and_says_the_same(finished: Summary, place: Path) -> None:
    before = cells(place / "whole")
    again = multiflora.compare(plan(place, "whole"), quiet=True)
    assert cells(place / "whole") == before
    assert again.to_dict() == finished.to_dict()
    assert json.loads((place / "whole" / "summary.json").read_text()) == json.loads(json.dumps(finished.to_dict()))


def test_one_more_seed_runs_only_that_seed(finished: Summary, place: Path) -> None:
    before = cells(place / "whole")
    more = multiflora.compare(plan(place, "whole"), ["compare.seeds=3"], quiet=True)
    after = cells(place / "whole")
    assert more.seeds == (0, 1, 2)
    assert {name: after[name] for name in before} == before
    assert sorted(name[:-11] for name in after.keys() - before.keys()) == ["lora-seed2", "rlora-seed2"]


def test_killed_half_way_it_goes_on_where_it_was(place: Path) -> None:
    (place / "killed.yaml").write_text(json.dumps(plan(place, "killed", seeds=1)))
    words = [str(COMMAND), "compare", str(place / "killed.yaml")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    with subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("2 of 3: lora-seed0"):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = cells(place / "killed")
    assert sorted(name[:-11] for name in before) == ["base-base0", "lora-seed0"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    after = cells(place / "killed")
    assert {name: after[name] for name in before} == before
    assert sorted(name[:-11] for name in after.keys() - before.keys()) == ["rlora-seed0"]
    assert "2 of 3 cells are finished already" in done.stderr
    assert "Nothing can be said of rlora against lora from one seed" in done.stdout


def runs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").iterdir()}


@pytest.fixture(scope="module")
def searched(place: Path) -> Summary:
    search = {"trials": 1, "factor": 30, "grow": 1}
    return multiflora.compare(plan(place, "searched", seeds=[5, 6], learning_rate=search), quiet=True)


def test_the_search_gives_every_method_the_same_rates_and_the_best_one(searched: Summary) -> None:
    tried = {row.label: [(t.rate, t.seed) for t in row.tuning.tried] for row in searched.rows if row.tuning}
    assert tried["lora"] == tried["rlora"]
    assert 3 <= len(tried["lora"]) <= 4
    assert (2e-4, 5) in tried["lora"]
    for row in searched.rows:
        assert row.tuning is not None
        assert row.tuning == decide(row.tuning.tried)
        assert row.learning_rate == row.tuning.chosen


def test_a_trial_at_the_best_rate_is_a_seed_and_is_not_trained_again(searched: Summary, place: Path) -> None:
    folder = place / "searched"
    tried = len(searched.rows[0].tuning.tried)
    # each method: a run for each rate with the first seed, and one more with the second
    assert len(runs(folder)) == 2 * (tried + 1)
    for row in searched.rows:
        seeds = [
            cell
            for name, (_, text) in cells(folder).items()
            if name.startswith(f"{row.label}-seed5")
            for cell in [json.loads(text)]
        ]
        assert [cell["learning_rate"] for cell in seeds] == [row.tuning.chosen]
        assert seeds[0]["split"] == "test"
        assert set(seeds[0]["rows"]) == {"roses", "tulips", "lilies"}
        assert seeds[0]["peak_memory_bytes"] > 2**20


def test_what_the_trial_is_scored_again_gives_is_what_a_training_gives(searched: Summary, place: Path) -> None:
    row = searched.rows[0]
    alone = multiflora.compare(
        plan(place, "alone", seeds=[5], methods=[{"lora": {"r": 4}}]),
        [f"train.learning_rate={row.learning_rate}"],
        quiet=True,
    )
    name = next(name for name in alone.cells if name.startswith("lora"))
    trained = json.loads(cells(place / "alone")[name][1])
    again = json.loads(cells(place / "searched")[name][1])  # the same name: it is the same training
    assert again["rows"]["roses"]["nll"] == pytest.approx(trained["rows"]["roses"]["nll"], abs=1e-6)
    assert again["scores"]["macro"] == trained["scores"]["macro"]


def test_a_search_that_was_stopped_goes_on_and_says_the_same(searched: Summary, place: Path) -> None:
    folder = place / "searched"
    for name in [name for name in cells(folder) if name.startswith(("rlora-trial", "lora-seed5"))][:3]:
        (folder / "cells" / f"{name}.json").unlink()
    before = runs(folder)
    again = multiflora.compare(folder / "comparison.yaml", quiet=True)
    assert runs(folder) == before

    def told(summary: Summary) -> dict[str, Any]:
        """All but the time of a forward pass, which is taken anew."""
        plain = summary.to_dict()
        return {**plain, "rows": [{**row, "latency": None} for row in plain["rows"]]}

    assert told(again) == told(searched)


def test_what_is_read_of_an_unfinished_search_is_what_was_found(searched: Summary, place: Path) -> None:
    (place / "searched" / "summary.json").unlink()
    found = read_comparison(place / "searched")
    assert (found.missing, found.left_out) == (0, 0)
    assert [row.tuning for row in found.summary.rows] == [row.tuning for row in searched.rows]
    assert found.summary.answer == searched.answer


def test_equal_time_gives_every_method_steps_of_its_own(place: Path) -> None:
    whole = plan(place, "timed", seeds=1, budget="time") | {"evaluate": {"limit": 2, "during": [0.5]}}
    found = multiflora.compare(whole, quiet=True)
    made = [json.loads(text) for _, text in cells(place / "timed").values()]
    clocks = [cell for cell in made if cell["kind"] == "clock"]
    assert len(clocks) == 6
    assert all(len(cell["speeds"]) == 11 for cell in clocks)
    assert sorted(name[:-11] for name in runs(place / "timed") if "clock" not in name) == ["lora-seed0", "rlora-seed0"]
    lora = next(row for row in found.rows if row.label == "lora")
    assert [share for share, _ in lora.course] == [0.5, 1.0]
    assert lora.course[-1][1].mean == lora.score.mean.mean
    trained = next(cell for cell in made if cell["kind"] == "seed" and cell["label"] == "lora")
    assert [point["step"] for point in trained["course"]] == [1]


def test_a_cell_that_fails_does_not_stop_the_others(place: Path) -> None:
    methods = [{"name": "rlora", "num_heads": 2, "train": {"max_length": 2}}, {"lora": {"r": 4}}]
    with pytest.raises(EnvironmentProblem, match=r"1 of 3 cells could not be finished(?s:.)*- rlora-seed0-\w+: "):
        multiflora.compare(plan(place, "failing", seeds=1, methods=methods), quiet=True)
    assert sorted(name[:-11] for name in cells(place / "failing")) == ["base-base0", "lora-seed0"]


def test_a_second_process_is_told_to_wait(place: Path) -> None:
    (place / "busy").mkdir()
    with (place / "busy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="Another process runs the comparison in"):
            multiflora.compare(plan(place, "busy"), quiet=True)


@pytest.mark.slow
def test_two_devices_give_the_same_cells(finished: Summary, place: Path) -> None:
    summary = multiflora.compare(plan(place, "beside", devices=2), quiet=True)
    theirs = {row.label: row.tasks for row in summary.rows}
    assert theirs["lora"] == {row.label: row.tasks for row in finished.rows}["lora"]


def test_a_dry_run_prints_the_budget_and_trains_nothing(place: Path) -> None:
    (place / "dry.yaml").write_text(json.dumps(plan(place, "dry")))
    words = [str(COMMAND), "compare", str(place / "dry.yaml"), "--dry-run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["lora"]["rank"] == 4
    assert found["rlora"]["parameters"] == pytest.approx(found["lora"]["parameters"], rel=0.1)
    assert not (place / "dry").exists()


def test_single_tasks_are_trained_at_both_sizes_and_compared(place: Path) -> None:
    section = {"methods": [{"lora": {"r": 4}}], "seeds": 2, "single_task": True, "transfer": True}
    found = multiflora.compare(plan(place, "singles", **section), quiet=True)
    kinds = sorted(re.sub(r"-[0-9a-f]{10}$", "", name) for name in cells(place / "singles"))
    single = [
        f"{size}-{task}-single{seed}"
        for size in ("each", "together")
        for task in ("roses", "tulips")
        for seed in (0, 1)
    ]
    assert kinds == ["base-base0", *single[:4], "lora-seed0", "lora-seed1", *single[4:]]
    each, together = found.single_task
    assert each.parameters == 2 * found.rows[0].parameters
    assert together.parameters == found.rows[0].parameters
    assert (each.rank, together.rank) == (4, 2)
    for size in (each, together):
        assert set(size.scores) == set(size.matrix) == set(size.tasks["lora"]) == {"roses", "tulips"}
        assert set(size.matrix["roses"]) == {"roses", "tulips"}
    text = next((place / "singles" / "cells").glob("each-roses-single0-*.json")).read_text()
    cell = json.loads(text)
    assert cell["seed"] == 0
    assert cell["settings"]["r"] == 4
    assert [line["step"] for line in cell["log"]] == [1]  # half of the two steps
    assert set(cell["rows"]) == {"roses", "tulips"}
    before = cells(place / "singles")
    again = multiflora.compare(plan(place, "singles", **section), quiet=True)
    assert again.to_dict() == found.to_dict()
    assert cells(place / "singles") == before
    read = read_comparison(place / "singles").summary
    assert read.single_task == found.single_task
    words = report(place / "singles", measure=False).page.read_text("utf-8")
    assert "Against one LoRA per task: the whole budget each" in words
    assert "What transfers, LoRAs of the budget together" in words


def test_loras_of_single_tasks_are_tuned_from_the_same_grid(place: Path) -> None:
    section = {
        "methods": [{"lora": {"r": 4}}],
        "seeds": 2,
        "single_task": True,
        "learning_rate": {"trials": 3, "grow": 0},
    }
    found = multiflora.compare(plan(place, "tuned-singles", **section), quiet=True)
    (lora,) = found.rows
    assert lora.tuning is not None
    rates = [trial.rate for trial in lora.tuning.tried]
    for size in found.single_task:
        assert size.tuning is not None
        assert [trial.rate for trial in size.tuning.tried] == rates
        singles = [path for path in cells(place / "tuned-singles") if path.startswith(f"{size.size}-")]
        own = [json.loads((place / "tuned-singles" / "cells" / f"{name}.json").read_text()) for name in singles]
        assert {cell["learning_rate"] for cell in own if cell["kind"] == "single"} == {size.tuning.chosen}
        assert {cell["split"] for cell in own if cell["kind"] == "trial"} == {"validation"}
        # a trial of full length is the first seed's training: 3 rates, one seed more, for each of two tasks
        runs = [path for path in (place / "tuned-singles" / "runs").iterdir() if path.name.startswith(f"{size.size}-")]
        assert len(runs) == 2 * (3 + 1)
        both = {lora.tuning.state, size.tuning.state} == {"tuned"}
        assert both != ("lora" in size.missing)
        assert both or f"Nothing is said of lora against one LoRA per task {size_words(size.size)} yet" in found.answer
    words = report(place / "tuned-singles", measure=False).page.read_text("utf-8")
    for size in found.single_task:
        assert size.tuning is not None
        assert f"with a learning rate of {size.tuning.chosen:.3g} ({size.tuning.state})" in words


@pytest.mark.parametrize("section", [{}, {"learning_rate": {"max_steps": 1}}])
def test_single_tasks_that_cannot_be_are_refused_before_anything_is_trained(
    place: Path, section: dict[str, Any]
) -> None:
    wanted = plan(place, "early", single_task=True, **section)
    wanted["train"] = wanted["train"] | ({} if section else {"max_steps": 1})
    with pytest.raises(ConfigError, match=r"compare\.single_task trains one LoRA for each of 2 tasks"):
        multiflora.compare(wanted, quiet=True)
    assert not (place / "early" / "runs").exists()


@pytest.mark.parametrize(
    ("strategy", "train", "expected"),
    [
        ("equal", {"max_steps": 9}, [5, 4]),
        ("size", {"max_steps": 9}, [6, 3]),
        ("equal", {"epochs": 2, "batch_size": 4}, [3, 2]),
    ],
)
def test_a_single_task_gets_its_share_of_the_steps(
    tmp_path: Path, strategy: str, train: dict[str, Any], expected: list[int]
) -> None:
    tasks = []
    for name, size in (("a", 6), ("b", 3)):
        (tmp_path / name).mkdir()
        for split, rows in (("train", size), ("validation", 1), ("test", 1)):
            lines = [json.dumps({"prompt": f"{name} {split} {i}", "completion": " x"}) for i in range(rows)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
        tasks.append(str(tmp_path / name))
    plain = {"model": "m", "method": "lora", "tasks": tasks, "train": train, "mixture": {"strategy": strategy}}
    assert steps_of_each(recipe_from({**plain, "output": "out"})) == expected
