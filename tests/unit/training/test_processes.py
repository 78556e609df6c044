"""Which process this is, and whether parameters are spread, comes from the environment that launchers set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from multiflora.training.processes import is_first_process, is_sharded, num_processes, own_device


def test_alone_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (num_processes(), is_first_process()) == (1, True)


def test_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert (num_processes(), is_first_process()) == (4, False)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the machine has an accelerator")
def test_without_an_accelerator_it_is_the_cpu() -> None:
    assert own_device() == torch.device("cpu")


@pytest.mark.parametrize(("rank", "index"), [(None, 0), ("3", 3)])
def test_each_process_of_a_machine_has_an_accelerator_of_its_own(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, index: int
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_device() == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("switches", "spread"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "true"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False),
        ({"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}, False),
    ],
)
def test_fsdp_and_zero3_spread_parameters(
    monkeypatch: pytest.MonkeyPatch, switches: dict[str, str], spread: bool
) -> None:
    for name, value in ({"WORLD_SIZE": "2"} | switches).items():
        monkeypatch.setenv(name, value)
    assert is_sharded() == spread


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_file_says_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert is_sharded() == (stage == 3)
