"""Which process this is comes from the environment that torchrun sets."""

from __future__ import annotations

import pytest
import torch

from multiflora.train.processes import is_first_process, num_processes, own_device


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
