"""Where a benchmark runs: never beside what the training in it would take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multiflora.bench.run import bench
from multiflora.errors import ConfigError


@pytest.mark.parametrize(
    ("wanted", "available", "mend"),
    [
        ("cpu", True, "CUDA_VISIBLE_DEVICES to nothing"),
        ("cuda", False, "give --device cpu"),
    ],
)
def test_a_device_that_training_would_not_take(wanted, available, mend, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(ConfigError, match=mend):
        bench(tmp_path / "bench.json", device=wanted)
    assert not list(tmp_path.iterdir())
