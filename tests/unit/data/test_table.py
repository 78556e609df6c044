"""The mixture's table shows each task's shares in examples and in tokens."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from multiflora.data.mixture import Mixture
from multiflora.data.table import mixture_table


def test_the_table_names_every_task_and_its_shares() -> None:
    mixture = Mixture(names=("short", "long"), sizes=(10, 10), counts=(10, 10), seed=0)
    lengths = np.array([100] * 10 + [300] * 10)
    report = mixture.report(mixture.plan(20), lengths, np.array([2] * 10 + [18] * 10))
    console = Console(width=80, record=True)
    console.print(mixture_table(report))
    lines = console.export_text().splitlines()
    [short] = [line for line in lines if "short" in line]
    [long] = [line for line in lines if "long" in line]
    assert all(figure in short for figure in ("10", "50.0%", "1,000", "25.0%", "20", "10.0%", "1.00"))
    assert all(figure in long for figure in ("10", "50.0%", "3,000", "75.0%", "180", "90.0%", "1.00"))
