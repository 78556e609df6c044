"""Every script in examples/ runs, with a tiny model in place of the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {"own_tasks.py": "macro average", "sft_trainer.py": "saved and loaded again: 4 heads of rank 8"}


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == sorted(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, desk: dict[str, str]) -> None:
    words = ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--output", "out", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *words], env=desk, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
