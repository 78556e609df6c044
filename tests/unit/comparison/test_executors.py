"""Cells on a cluster: submitit's own local executor runs the same path that Slurm does."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from multiflora.comparison.executors import on_ray, on_slurm
from multiflora.errors import EnvironmentProblem

# a job starts in a process of its own and must find its function there; this one refuses an empty path
WORK: Any = os.path.relpath


def test_every_cell_is_a_job_and_a_failed_one_does_not_end_the_others(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    cells = [f"{tmp_path}/roses", "", f"{tmp_path}/tulips"]
    found = dict(on_slurm(WORK, cells, tmp_path, at_once=2, resources={"cluster": "local", "timeout_min": 5}))
    assert (found[cells[0]], found[cells[2]]) == ("roses", "tulips")
    assert isinstance(found[""], Exception)
    assert "no path specified" in str(found[""])
    assert any((tmp_path / "jobs").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_every_cell_is_a_task_of_ray(tmp_path: Path) -> None:
    cells = [f"{tmp_path}/roses", "", f"{tmp_path}/tulips"]
    found = dict(on_ray(WORK, cells, tmp_path, at_once=1, resources={"num_cpus": 1}))
    assert (found[cells[0]], found[cells[2]]) == ("roses", "tulips")
    assert isinstance(found[""], Exception)


@pytest.mark.parametrize(("package", "run", "extra"), [("submitit", on_slurm, "slurm"), ("ray", on_ray, "ray")])
def test_what_is_missing_is_named_with_the_command_that_installs_it(
    package: str, run: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentProblem, match=rf"needs the package {package}.*pip install 'multiflora\[{extra}\]'"):
        list(run(WORK, ["roses"], tmp_path, at_once=None, resources={}))
