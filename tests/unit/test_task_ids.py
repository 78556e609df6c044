"""Which task is meant: names and numbers against a config's list, and what is no id at all."""

from __future__ import annotations

import pytest
import torch

from multiflora import AdapterError, HydraLoraConfig
from multiflora.task_ids import are_numbers, check_range, checked_ids, index_of, knows, missing

NAMED = HydraLoraConfig(task_names=["sum", "sort"])
NUMBERED = HydraLoraConfig(num_tasks=3)
UNTOLD = HydraLoraConfig()


def test_a_task_by_name_or_number():
    assert [index_of(NAMED, which) for which in ("sum", "sort", 0, 1)] == [0, 1, 0, 1]
    assert index_of(NUMBERED, 2) == 2
    assert index_of(UNTOLD, 7) == 7
    for config, which, message in (
        (NAMED, "sotr", r"no task 'sotr'; its tasks are sum, sort\."),
        (NAMED, 2, r"no task 2; its tasks are sum, sort\."),
        (NAMED, -1, "no task -1"),
        (NUMBERED, 3, r"no task 3; its tasks are 0 to 2\."),
        (NUMBERED, "sum", r"no task 'sum'; its tasks are 0 to 2\."),
        (UNTOLD, "sum", r"no task 'sum'; its tasks are not named in its config \(set task_names\)\."),
    ):
        assert not knows(config, which)
        with pytest.raises(AdapterError, match=message):
            index_of(config, which)


def test_ids_that_come_with_a_batch():
    assert checked_ids("sum", 2) == ["sum"]
    assert checked_ids(("sum", 1), 2) == ["sum", 1]
    assert checked_ids(["sum", "sort"], None) == ["sum", "sort"]
    assert torch.equal(checked_ids(1, 2), torch.tensor(1))
    assert torch.equal(checked_ids([1, 0], 2), torch.tensor([1, 0]))
    assert checked_ids(torch.tensor([1, 0], dtype=torch.int32), 2).dtype == torch.long
    assert checked_ids(torch.zeros(2, 5, dtype=torch.long), 2).shape == (2, 5)
    assert checked_ids(torch.zeros(1, 5, dtype=torch.long), 2).shape == (1, 5)
    assert checked_ids(torch.tensor([1, 0, 1]), None).shape == (3,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1.0, 0.0]), "must hold whole numbers"),
        (torch.tensor([True, False]), r"tensor of torch\.bool with shape \(2,\)"),
        (torch.zeros(2, 1, 1, dtype=torch.long), r"shape \(2, 1, 1\)"),
        (torch.tensor([0, 1, 0]), r"has shape \(3,\), but the batch has 2 rows"),
        (["sum", "sort", "sum"], r"has shape \(3,\), but the batch has 2 rows"),
        (torch.zeros(3, 5, dtype=torch.long), r"has shape \(3, 5\), but the batch has 2 rows"),
    ],
)
def test_ids_that_cannot_be_meant(ids, message):
    with pytest.raises(AdapterError, match=message):
        checked_ids(ids, 2)


def test_numbers_out_of_range():
    check_range(NUMBERED, torch.tensor([0, 2]))
    check_range(NUMBERED, torch.tensor([], dtype=torch.long))
    check_range(UNTOLD, torch.tensor([99]))
    for ids, message in (
        ([0, 3], r"from 0 to 3, but the adapter has 3 tasks \(0 to 2\)\. Give ids from 0 to 2\."),
        ([-1, 1], "from -1 to 1"),
    ):
        with pytest.raises(AdapterError, match=message):
            check_range(NUMBERED, torch.tensor(ids))


def test_what_are_numbers():
    assert are_numbers(torch.tensor([0]))
    assert are_numbers([0, 1])
    assert not are_numbers([0, "sum"])
    assert not are_numbers(["sum"])


def test_what_is_said_where_a_task_is_missing():
    assert "its tasks are sum, sort." in str(missing(NAMED))
    assert "its tasks are 0 to 2." in str(missing(NUMBERED))
    assert "HydraLoraConfig: num_tasks is None" in str(missing(UNTOLD))
