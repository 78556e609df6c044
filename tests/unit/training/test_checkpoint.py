"""A checkpoint is whole only with every file as it was sealed; anything else is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multiflora.errors import EnvironmentProblem
from multiflora.training.checkpoint import (
    CHECKPOINTS,
    SEAL,
    Window,
    is_whole,
    last_checkpoint,
    processes_of,
    remove_older,
    seal,
)

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "shards/0_0.distcp")


def make_checkpoint(folder: Path, step: int, *, sealed: bool = True, processes: int = 1) -> Path:
    checkpoint = folder / CHECKPOINTS / f"checkpoint-{step}"
    for name in FILES:
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} at step {step}".encode() * 10)
    for rank in range(processes):
        Window.save(checkpoint, rank, {"loss": torch.tensor(1.5), "step": torch.tensor(step)})
    if sealed:
        seal(checkpoint, processes=processes)
    return checkpoint


@pytest.mark.parametrize("name", [*FILES, "log_window_0.safetensors", "log_window_1.safetensors", SEAL])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one bit"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    good = make_checkpoint(tmp_path, 5, processes=2)
    bad = make_checkpoint(tmp_path, 10, processes=2)
    assert last_checkpoint(tmp_path) == bad
    path, content = bad / name, (bad / name).read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert not is_whole(bad)
    assert last_checkpoint(tmp_path) == good


def test_without_a_seal_there_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5, sealed=False)
    (tmp_path / CHECKPOINTS / "checkpoint-tmp").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nothing") is None


def test_the_newest_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    newest = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 9)
    assert last_checkpoint(tmp_path) == newest


def test_older_ones_and_unfinished_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 15, sealed=False)
    remove_older(tmp_path / CHECKPOINTS)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_files_of_other_machines_that_are_not_there_are_told_of(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5, sealed=False)
    with pytest.raises(
        EnvironmentProblem, match=r"lacks the files of 3 of 4 processes .* must share its output folder"
    ):
        seal(checkpoint, processes=4)
    assert not (checkpoint / SEAL).exists()


def test_the_number_of_processes_and_the_log_window_come_back(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5, processes=2)
    assert processes_of(checkpoint) == 2
    kept = Window.load(checkpoint, 1, torch.device("cpu"))
    assert (float(kept["loss"]), int(kept["step"])) == (1.5, 5)
