"""The output folder is never overwritten, resumes only its own recipe, and a full disk is said plainly."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.recipe import Recipe, recipe_from
from multiflora.train.checkpoint import CHECKPOINTS, Window, seal
from multiflora.train.output import disk_guard, open_output


def make_recipe(output: Path, **changes: Any) -> Recipe:
    task = {"name": "sums", "source": {"generator": "basic_arithmetic"}}
    return recipe_from({"model": "some/model", "method": "lora", "tasks": [task], "output": str(output), **changes})


def make_checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    checkpoint = folder / CHECKPOINTS / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    Window.save(checkpoint, 0, {"step": torch.tensor(step)})
    if whole:
        seal(checkpoint, processes=1)
    return checkpoint


def test_a_new_or_an_empty_folder_may_be_written(tmp_path: Path) -> None:
    assert open_output(make_recipe(tmp_path / "new"), resume=False) is None
    assert open_output(make_recipe(tmp_path), resume=False) is None


def test_a_folder_with_a_run_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("kept")
    with pytest.raises(ConfigError, match=r"holds a run already; nothing was changed there. Choose another output"):
        open_output(make_recipe(tmp_path), resume=False)
    assert (tmp_path / "recipe.yaml").read_text() == "kept"


def test_a_folder_with_anything_else_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"exists and is not empty already"):
        open_output(make_recipe(tmp_path), resume=False)
    with pytest.raises(ConfigError, match=r"exists and is not empty already"):
        open_output(make_recipe(tmp_path / "thesis.tex"), resume=False)


def test_an_interrupted_run_is_refused_with_a_hint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"go on from its checkpoints with --resume"):
        open_output(make_recipe(tmp_path), resume=False)


def test_resuming_takes_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, whole=False)
    (tmp_path / CHECKPOINTS / "recipe.yaml").write_text(recipe.to_yaml(tmp_path / CHECKPOINTS))
    assert open_output(recipe, resume=True) == newest


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to resume.*has no whole checkpoint. Set train.save_every"):
        open_output(make_recipe(tmp_path), resume=True)


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    (tmp_path / CHECKPOINTS / "recipe.yaml").write_text(make_recipe(tmp_path).to_yaml(tmp_path / CHECKPOINTS))
    with pytest.raises(ConfigError, match=r"come from another recipe: seed differ"):
        open_output(make_recipe(tmp_path, seed=7), resume=True)


def test_resuming_with_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    make_checkpoint(tmp_path, 5)
    (tmp_path / CHECKPOINTS / "recipe.yaml").write_text(recipe.to_yaml(tmp_path / CHECKPOINTS))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"was written by 1 processes, and this run has 2.*Resume with 1 processes"):
        open_output(recipe, resume=True)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    recipe = make_recipe(tmp_path)
    (tmp_path / CHECKPOINTS / "recipe.yaml").write_text(recipe.to_yaml(tmp_path / CHECKPOINTS))
    (tmp_path / "results.json").touch()
    assert open_output(recipe, resume=True) is not None  # killed before its model card was written
    (tmp_path / "README.md").touch()
    with pytest.raises(ConfigError, match=r"is finished; there is nothing to resume"):
        open_output(recipe, resume=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full (Linux)")
def test_a_full_disk_is_said_plainly(tmp_path: Path) -> None:
    wanted = r"No space left to write the run to .*MiB are free there.*Free some"
    with pytest.raises(EnvironmentProblem, match=wanted), disk_guard(tmp_path / "new" / "run"):
        Path("/dev/full").write_text("something")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The nearest thing to a full disk that needs no rights: the system refuses to let a file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_full_disk_is_seen_behind_the_libraries_own_errors(tmp_path: Path, save: Callable[..., None]) -> None:
    refused = pytest.raises(EnvironmentProblem, match="No space left to write")
    with refused, disk_guard(tmp_path), files_of_at_most(100_000):
        save({"tensor": torch.zeros(1 << 16)}, tmp_path / "weights")


def test_other_errors_pass_the_guard(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero"), disk_guard(tmp_path):
        _ = 1 / 0
    with pytest.raises(OSError, match="Permission denied"), disk_guard(tmp_path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
