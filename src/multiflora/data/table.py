"""The mixture as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multiflora.text_table import TextTable

__all__ = ["mixture_table"]


def mixture_table(report: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Lay out a report of `multiflora.data.mixture.Mixture` as a rich table.

    Args:
        report: Task -> its figures.
    """
    table = TextTable("task", title="Training mixture")
    for heading in ("examples", "share", "tokens", "share", "with loss", "share", "passes"):
        table.add_column(heading, justify="right")
    for task, row in report.items():
        table.add_row(
            task,
            f"{row['examples']:,}",
            f"{row['share_of_examples']:.1%}",
            f"{row['tokens']:,}",
            f"{row['share_of_tokens']:.1%}",
            f"{row['loss_tokens']:,}",
            f"{row['share_of_loss_tokens']:.1%}",
            f"{row['passes']:.2f}",
        )
    return table
