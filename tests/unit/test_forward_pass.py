"""What a layer knows of its tokens: rows, padding and tasks, in every shape that they come in."""

from __future__ import annotations

import pytest
import torch

from multiflora import AdapterError, HydraLoraConfig
from multiflora.forward_pass import Pass, Side, Tokens

CPU = torch.device("cpu")
NAMED = HydraLoraConfig(task_names=["sum", "sort", "copy"])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def tokens(lead, *, rows=2, length=3, mask=None, ids=None, default=None, pictures=False, **more):
    passed = Pass(default)
    passed.ids, passed.pictures = ids, pictures
    return Tokens(passed, "up", Side(rows, length, mask), torch.Size(lead), **more)


def numbers(found):
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        (tokens([2, 3]), [0, 0, 0, 1, 1, 1]),
        (tokens([6]), [0, 0, 0, 1, 1, 1]),  # one after another
        (tokens([6], shared_out=True), None),  # as many as all, but an expert's
        (tokens([2, 3], shared_out=True), [0, 0, 0, 1, 1, 1]),
        (tokens([4]), None),
        (tokens([2]), [0, 1]),  # one vector for each row, behind a pooling
        (tokens([2], listed=True), None),  # which no layer in a list is: two chosen tokens
        (tokens([2], shared_out=True), [0, 1]),
        (tokens([2], length=1), [0, 1]),
        (tokens([2], length=1, listed=True), [0, 1]),
        (tokens([2], length=None), [0, 1]),
        (tokens([2], length=None, listed=True), [0, 1]),
        (tokens([2], length=1, shared_out=True), None),
        (tokens([3], length=None), None),
        (tokens([2, 2, 2]), [0, 0, 0, 0, 1, 1, 1, 1]),  # more axes
        (tokens([4, 2]), None),
        (tokens([4, 2], pictures=True), [0, 0, 0, 0, 1, 1, 1, 1]),  # windows of a row lie together
        (tokens([3, 2], pictures=True), None),
        (tokens([0, 2], pictures=True), None),
        (tokens([5], rows=1), [0, 0, 0, 0, 0]),
        (tokens([5, 2], rows=1, shared_out=True), [0] * 10),
        (tokens([2, 2], rows=None, length=None), [0, 0, 1, 1]),
        (tokens([], rows=None, length=None), [0]),
        (tokens([3], chosen=torch.tensor([0, 3, 5])), [0, 1, 1]),
        (tokens([2], rows=None, length=None, chosen=torch.tensor([0, 1])), [0, 1]),
    ],
)
def test_the_row_of_each_token(found, rows):
    assert numbers(found.rows(CPU)) == rows


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (tokens([2, 3], mask=MASK), [1, 1, 0, 1, 0, 0]),
        (tokens([6], mask=MASK), [1, 1, 0, 1, 0, 0]),
        (tokens([6], mask=MASK, shared_out=True), None),
        (tokens([4], mask=MASK), None),
        (tokens([2, 3]), None),
        (tokens([2], length=None, mask=MASK), None),
        (tokens([3, 3], rows=3, mask=MASK), None),  # beam search's rows, without their padding
        (tokens([2, 4], length=4, mask=MASK), None),
        (tokens([2, 2], length=2, mask=MASK), [1, 0, 0, 0]),  # a cache holds what was before
        (tokens([3], mask=MASK, chosen=torch.tensor([0, 2, 3])), [1, 0, 1]),
    ],
)
def test_padding(found, kept):
    assert numbers(found.keep()) == kept


EACH = torch.tensor([[0, 1, 2], [2, 2, 0]])


@pytest.mark.parametrize(
    ("found", "tasks"),
    [
        (tokens([2, 3]), None),
        (tokens([2, 3], default="sort"), [1] * 6),
        (tokens([2, 3], default=2), [2] * 6),
        (tokens([2, 3], default=["copy", "sum"]), [2, 2, 2, 0, 0, 0]),
        (tokens([2, 3], default="sort", ids=torch.tensor([2, 0])), [2, 2, 2, 0, 0, 0]),  # with the batch comes first
        (tokens([2, 3], ids=["sort", 2]), [1, 1, 1, 2, 2, 2]),
        (tokens([2, 3], ids=["sort"]), [1] * 6),
        (tokens([2, 3], ids=torch.tensor(1)), [1] * 6),
        (tokens([2, 3], ids=torch.tensor([[1]])), [1] * 6),
        (tokens([4, 3], rows=4, ids=torch.tensor([1, 2])), [1] * 6 + [2] * 6),  # copies of a row lie together
        (tokens([2, 3], ids=EACH), [0, 1, 2, 2, 2, 0]),
        (tokens([6], ids=EACH), [0, 1, 2, 2, 2, 0]),
        (tokens([2], ids=EACH, chosen=torch.tensor([1, 3])), [1, 2]),
        (tokens([2], ids=torch.tensor([[1, 1, 1], [2, 2, 2]])), [1, 2]),  # behind a pooling
        (tokens([2], ids=torch.tensor([2, 0]), chosen=torch.tensor([1, 2])), [2, 2]),
        (tokens([4], ids=torch.tensor([2, 2]), shared_out=True), [2] * 4),  # in no order, but of one task
        (tokens([6], ids=torch.tensor([[1, 1, 1], [1, 1, 1]]), shared_out=True), [1] * 6),
        (tokens([2], rows=None, length=None, ids=torch.tensor([1, 0])), [1, 0]),
        (tokens([2, 2], rows=None, length=None, ids=torch.tensor([1, 0])), [1, 1, 0, 0]),
    ],
)
def test_the_task_of_each_token(found, tasks):
    assert numbers(found.tasks(NAMED, CPU)) == tasks


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (tokens([4], ids=torch.tensor([1, 0])), "up sees 4 tokens of a batch of 2 rows, and not in the order"),
        (tokens([6], ids=torch.tensor([1, 0]), shared_out=True), "up sees 6 tokens of a batch of 2 rows"),
        (tokens([6], ids=EACH, shared_out=True), r"does not fit a layer input of shape \(6,\) \(up\)"),
        (tokens([2], ids=EACH), r"task_id has shape \(2, 3\), which does not fit a layer input of shape \(2,\)"),
        (tokens([4, 3], rows=4, ids=torch.tensor([0, 1, 2])), "tasks for 3 rows, but the batch has 4"),
        (tokens([2, 3], ids=torch.tensor([0, 3])), "from 0 to 3, but the adapter has 3 tasks"),
        (tokens([2, 3], ids=["sum", "drama"]), "no task 'drama'"),
        (tokens([2], rows=None, length=None, ids=torch.tensor([1, 0]), shared_out=True), None),
    ],
)
def test_tasks_that_cannot_be_known(found, message):
    if message is None:
        assert numbers(found.tasks(NAMED, CPU)) == [1, 0]
        return
    with pytest.raises(AdapterError, match=message):
        found.tasks(NAMED, CPU)


def test_an_adapter_of_one_task_needs_none():
    one = HydraLoraConfig(task_names=["sum"])
    assert numbers(tokens([2, 3]).tasks(one, CPU)) == [0] * 6
    assert Pass(None).one_task(one) == 0


def test_an_adapter_that_was_told_of_no_tasks():
    untold = HydraLoraConfig()
    assert tokens([2, 3], default="sum").tasks(untold, CPU) is None
    assert numbers(tokens([2], length=None, ids=torch.tensor([7, 3])).tasks(untold, CPU)) == [7, 3]
    with pytest.raises(AdapterError, match="not named in its config"):
        tokens([2, 3], ids=["sum", "sort"]).tasks(untold, CPU)


def test_an_adapter_s_own_rows_in_a_batch_of_several():
    mixed = tokens([2, 3], ids=["sort", "another's"])
    assert numbers(mixed.tasks(NAMED, CPU, [0]))[:3] == [1, 1, 1]
    with pytest.raises(AdapterError, match='no task "another\'s"'):
        mixed.tasks(NAMED, CPU, [1])
    with pytest.raises(AdapterError, match='no task "another\'s"'):
        mixed.tasks(NAMED, CPU)
    numbered = tokens([2, 3], ids=torch.tensor([2, 9]))
    assert numbers(numbered.tasks(NAMED, CPU, [0]))[:3] == [2, 2, 2]
    with pytest.raises(AdapterError, match="from 9 to 9"):
        numbered.tasks(NAMED, CPU, [1])
    for one in (torch.tensor(9), torch.tensor([9])):  # one for all rows
        with pytest.raises(AdapterError, match="from 9 to 9"):
            tokens([2, 3], ids=one).tasks(NAMED, CPU, [1])
    assert numbers(tokens([2, 3], ids=["copy"]).tasks(NAMED, CPU, [1])) == [2] * 6


def test_the_one_task_of_all_rows():
    def one(ids, rows=None, default=None):
        passed = Pass(default)
        passed.ids = ids
        return passed.one_task(NAMED, rows)

    assert one(torch.tensor([2, 2])) == one(torch.tensor(2)) == one(["copy", 2]) == one(None, default="copy") == 2
    assert one(torch.tensor([[1, 1], [1, 1]])) == 1
    assert one(torch.tensor([2, 1])) is one(torch.tensor([0, 1])) is one(None) is None
    assert one(torch.tensor([], dtype=torch.long)) is None
    assert one(torch.tensor([2]), [0]) == one(torch.tensor(2), [1]) == 2
    assert one(torch.tensor([2, 2]), [0]) is None
    passed = Pass("sum")
    other = HydraLoraConfig(task_names=["copy", "sum"])  # each adapter by its own list, asked twice
    assert [passed.one_task(config) for config in (NAMED, other, NAMED, other)] == [0, 1, 0, 1]
