"""The output folder is never overwritten, resumes only its own recipe, and a full disk is said plainly."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multiflora.artifact import fingerprint
from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.export.stage import check_free
from multiflora.files import check_writable, write_json
from multiflora.recipe import Recipe, recipe_from
from multiflora.training.checkpoint import CHECKPOINTS, DATA, Window, seal
from multiflora.training.output import check_data, disk_guard, only_run, open_output


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


def test_a_trial_of_another_process_of_the_same_run_is_no_hindrance_and_stays(tmp_path: Path) -> None:
    recipe, trial = make_recipe(tmp_path / "run"), tmp_path / "run" / ".writable-abcd1234"
    trial.mkdir(parents=True)
    assert open_output(recipe, resume=False) is None
    make_checkpoint(tmp_path / "run", 5)
    (tmp_path / "run" / CHECKPOINTS / "recipe.yaml").write_text(recipe.to_yaml(tmp_path / "run" / CHECKPOINTS))
    assert open_output(recipe, resume=True) is not None
    assert trial.is_dir()


def test_a_folder_with_anything_else_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"exists and is not empty already"):
        open_output(make_recipe(tmp_path), resume=False)
    with pytest.raises(EnvironmentProblem, match=r"thesis.tex is no folder"):
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


def test_a_recipe_that_differs_is_told_by_its_keys(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    (tmp_path / CHECKPOINTS / "recipe.yaml").write_text(make_recipe(tmp_path).to_yaml(tmp_path / CHECKPOINTS))
    other = make_recipe(tmp_path, train={"learning_rate": 1e-5, "batch_size": 3}, method={"name": "lora", "r": 5})
    with pytest.raises(ConfigError, match=r"recipe: method\.r, train\.batch_size, train\.learning_rate differ"):
        open_output(other, resume=True)


def test_resuming_with_other_rows_is_refused_by_the_tasks_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    before = {name: fingerprint([{"prompt": "a"}] * 3) for name in ("sums", "words")}
    check_data(tmp_path, before)  # written by an older version, which did not say
    write_json(tmp_path / CHECKPOINTS / DATA, before)
    check_data(tmp_path, before)
    for rows in ([{"prompt": "a"}] * 4, [{"prompt": "b"}] * 3):
        message = rf"trained on other data: words \(3 training rows then, {len(rows)} now\) changed since"
        with pytest.raises(ConfigError, match=message):
            check_data(tmp_path, before | {"words": fingerprint(rows)})


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_run_leaves_that_was_killed_before_its_first_checkpoint_is_no_hindrance(
    tmp_path: Path, resume: bool
) -> None:
    make_checkpoint(tmp_path, 5, whole=False)
    (tmp_path / CHECKPOINTS / "recipe.yaml").touch()
    (tmp_path / ".saving-abcd1234").mkdir()
    assert open_output(make_recipe(tmp_path), resume=resume) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "notes.txt", "checkpoints/notes.txt", "recipe.yaml"])
def test_nothing_of_value_is_ever_removed(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, 5, whole=False)
    (tmp_path / name).write_text("kept")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"already; nothing was changed there|nothing to resume"):
            open_output(make_recipe(tmp_path), resume=resume)
    assert (tmp_path / name).read_text() == "kept"
    assert (tmp_path / CHECKPOINTS / "checkpoint-5").is_dir()


def test_resuming_clears_what_a_killed_process_had_not_put_in_place(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    make_checkpoint(tmp_path, 5)
    (tmp_path / CHECKPOINTS / "recipe.yaml").write_text(recipe.to_yaml(tmp_path / CHECKPOINTS))
    (tmp_path / "harness").mkdir()
    kept, left = tmp_path / "harness" / "sums.jsonl", tmp_path / "harness" / ".sums.jsonl-ab_cd123"
    kept.touch()
    left.touch()
    assert open_output(recipe, resume=True) is not None
    assert kept.exists()
    assert not left.exists()


def places_that_cannot_be_written(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    found = [tmp_path / name for name in ("file", "file/x", "dangling", "dangling/x", "one", "one/x", "a" * 300)]
    found += [tmp_path / ("a/" * 2500), tmp_path / "a\0b", Path("/dev/null"), Path("/dev/null/x")]
    return found + ([Path("/proc"), Path("/proc/x")] if Path("/proc/self").exists() else [])


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for place in places_that_cannot_be_written(tmp_path):
        before = sorted(tmp_path.iterdir())
        for check in (check_writable, check_free):
            with pytest.raises(EnvironmentProblem, match=r"Cannot write .*Choose another output folder"):
                check(place)
        assert sorted(tmp_path.iterdir()) == before
    check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_of_two_runs_on_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    code = "from pathlib import Path; from multiflora.training.output import only_run\nwith only_run(Path({!r})): {}"
    place = tmp_path / "runs" / "one"
    held = subprocess.Popen(
        [sys.executable, "-c", code.format(str(place), "print(flush=True); input()")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout is not None
    held.stdout.readline()
    with pytest.raises(ConfigError, match=r"runs/one, which another run is writing to at this moment"), only_run(place):
        raise AssertionError("both run")
    held.kill()  # the system takes the lock back
    held.communicate()
    with only_run(place):
        pass
    assert list(tmp_path.iterdir()) == [place.parent]


def test_a_folder_that_stayed_empty_is_not_left_behind(tmp_path: Path) -> None:
    with only_run(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert list(tmp_path.iterdir()) == []
    with only_run(tmp_path / "runs" / "two"):
        (tmp_path / "runs" / "two" / "kept").touch()
    assert (tmp_path / "runs" / "two" / "kept").exists()


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
