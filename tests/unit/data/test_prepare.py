"""A short last step is filled up with rows that teach nothing."""

from __future__ import annotations

import pytest
from datasets import Dataset

from multiflora.data.prepare import fill_up


def rows(number: int) -> Dataset:
    return Dataset.from_list(
        [
            {"input_ids": [i] * (i + 2), "labels": [-100] * (i + 1) + [i], "task_id": 0, "length": i + 2}
            | {"loss_tokens": 1, "example": i, "id": f"row-{i}", "loss_weight": 0.5}
            for i in range(number)
        ]
    )


@pytest.mark.parametrize(("number", "multiple", "expected"), [(8, 4, 8), (9, 4, 12), (1, 8, 8), (5, 1, 5)])
def test_only_the_end_is_filled(number: int, multiple: int, expected: int) -> None:
    filled = fill_up(rows(number), multiple)
    assert len(filled) == expected
    assert filled[:number] == rows(number)[:]
    for row in list(filled)[number:]:
        assert row["labels"] == [-100] * row["length"] == [-100] * len(row["input_ids"])
        assert row["loss_tokens"] == 0
        assert row["loss_weight"] == 0
