"""What every method's description shares."""

from __future__ import annotations

import pytest

from multiflora import MoeLoraConfig
from multiflora.methods.base import task_list


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"task_names": ["sum", "sort"]}, "sum, sort"),
        ({"num_tasks": 3}, "0 to 2"),
        ({}, "unknown (the config names none)"),
    ],
)
def test_tasks_are_told_by_name_by_number_or_as_unknown(words, told):
    assert task_list(MoeLoraConfig(**words)) == told
