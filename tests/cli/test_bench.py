"""The benchmark on the command line: measured, gone on with, judged, refused."""

from __future__ import annotations

import json
from pathlib import Path

from .parts import Command
from .test_bad_input import refused

MEMORY = ("bench", "--quick", "--only", "memory")


def test_a_small_run_is_saved_judged_and_gone_on_with(installed: Command, multiflora: Command, tmp_path: Path) -> None:
    first = installed(*MEMORY, "--page", "pages/speed.md")
    assert first.code == 0, first.err
    assert "memory kept a token" in first.out
    assert "not measured" in first.out
    assert "copies of adapter weights" in (tmp_path / "pages" / "speed.md").read_text("utf-8")
    saved = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert len(saved["memory"]) == 2
    assert saved["machine"]["threads"] == 1

    more = installed("bench", "--quick", "--only", "shared", "--only", "memory", "--rounds", "1", "--resume", "--json")
    assert more.code == 0, more.err
    judged = {verdict["target"]: verdict for verdict in json.loads(more.out)["verdicts"]}
    assert judged["memory kept a token / published loop"]["verdict"] == "held"
    again = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert again["memory"] == saved["memory"]
    assert len(again["shared"]) == 1

    other = multiflora(*MEMORY, "--resume", "--threads", "2")
    refused(other, "was measured with threads 1, and here it is 2", "Leave --resume out")

    other = multiflora("bench", "--only", "memory", "--resume")
    refused(other, "was measured by `multiflora bench --quick`, and this is `multiflora bench`")

    report = multiflora("bench", "--report", "bench.json", "--json")
    assert json.loads(report.out) == json.loads(more.out)


def test_what_does_not_go_together(multiflora: Command, tmp_path: Path) -> None:
    refused(multiflora("bench", "--quick", "--full"), "--quick and --full are both given")
    refused(multiflora("bench", "--report", "x.json", "--quick"), "--report reads results and measures nothing")
    refused(multiflora("bench", "--report", "absent.json"), "absent.json cannot be read")
    (tmp_path / "wrong.json").write_text("{}", "utf-8")
    refused(multiflora("bench", "--report", "wrong.json"), "is no result of `multiflora bench`")


def test_a_folder_without_the_tasks(multiflora: Command, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "sst2").mkdir(parents=True)
    refused(multiflora("bench", "--tasks", "tasks"), "has no folder trec, agnews, commonsenseqa")
    assert not (tmp_path / "bench.json").exists()
