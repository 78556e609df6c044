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
from multiflora.compare.results import Summary
from multiflora.errors import EnvironmentProblem
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


def test_the_search_gives_every_method_as_many_trials_and_the_best_rate(place: Path) -> None:
    search = {"trials": 2, "low": 1e-4, "high": 1e-1, "max_steps": 1}
    summary = multiflora.compare(plan(place, "searched", seeds=[5], learning_rate=search), quiet=True)
    assert {row.label: len(row.tuning.tried) for row in summary.rows} == {"lora": 2, "rlora": 2}
    for row in summary.rows:
        assert row.learning_rate == row.tuning.chosen


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
