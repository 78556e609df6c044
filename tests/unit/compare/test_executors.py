"""Cells on a cluster: submitit's own local executor runs the same path that Slurm does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from multiflora.compare.executors import on_ray, on_slurm
from multiflora.errors import EnvironmentProblem


def halve(number: int, folder: Path) -> float:
    if number < 0:
        raise ZeroDivisionError(f"{number} in {folder.name}")
    return number / 2


def outcomes(results: Any) -> dict[int, Any]:
    return dict(results)


def test_every_cell_is_a_job_and_a_failed_one_does_not_end_the_others(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    found = outcomes(on_slurm(halve, [2, -1, 5], tmp_path, at_once=2, resources={"cluster": "local", "timeout_min": 5}))
    assert (found[2], found[5]) == (1.0, 2.5)
    assert isinstance(found[-1], Exception)
    assert f"-1 in {tmp_path.name}" in str(found[-1])
    assert any((tmp_path / "jobs").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_every_cell_is_a_task_of_ray(tmp_path: Path) -> None:
    found = outcomes(on_ray(halve, [2, -1, 5], tmp_path, at_once=1, resources={"num_cpus": 1}))
    assert (found[2], found[5]) == (1.0, 2.5)
    assert isinstance(found[-1], Exception)


@pytest.mark.parametrize(("package", "run", "extra"), [("submitit", on_slurm, "slurm"), ("ray", on_ray, "ray")])
def test_what_is_missing_is_named_with_the_command_that_installs_it(
    package: str, run: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(EnvironmentProblem, match=rf"needs the package {package}.*pip install 'multiflora\[{extra}\]'"):
        list(run(halve, [1], tmp_path, at_once=None, resources={}))
