"""How gates are counted: against sums worked out by hand, task by task, over batches, with padding and without."""

from __future__ import annotations

import math

import pytest
import torch

from multiflora.context import Routing
from multiflora.forward_pass import Pass, Side, Tokens
from multiflora.methods.head_load import LayerRouting, RoutingCounter

GATE = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])


def of_padded_rows(mask):
    """What a layer knows of four tokens in two rows."""
    return Tokens(Pass(None), "up", Side(2, 2, torch.tensor(mask)), torch.Size([2, 2]))


def entropy(*shares):
    return -sum(share * math.log(share) for share in shares if share) / math.log(2)


def test_all_tokens_together():
    counter = RoutingCounter(Routing())
    counter("up", GATE, None)
    found = counter.result()["up"]
    assert found.load == pytest.approx([0.625, 0.375])
    assert found.by_task == []
    assert found.entropy == pytest.approx((2 * entropy(0.25, 0.75) + 1) / 4)
    assert counter.result() == {}


def test_each_task_by_itself():
    counter = RoutingCounter(Routing(), num_tasks=3)
    for _ in range(2):  # batches add up
        counter("up", GATE, torch.tensor([0, 2, 2, 0]))
    found = counter.result()["up"]
    assert found.load == pytest.approx([0.625, 0.375])
    assert found.by_task == [pytest.approx([0.5, 0.5]), [0, 0], pytest.approx([0.75, 0.25])]
    counter("up", GATE, None)
    assert counter.result()["up"].by_task == []
    assert counter.result() == {}


def test_tasks_that_nobody_wants_apart_are_counted_together():
    counter = RoutingCounter(Routing())
    counter("up", GATE, torch.tensor([0, 2, 2, 0]))
    found = counter.result()["up"]
    assert (found.load, found.by_task) == (pytest.approx([0.625, 0.375]), [])


def test_padding_is_left_out():
    routing = Routing()
    counter = RoutingCounter(routing, num_tasks=2)
    with routing.reporting(of_padded_rows([[1, 0], [1, 0]])):
        counter("up", GATE, torch.tensor([0, 0, 1, 1]))
    found = counter.result()["up"]
    assert found.load == pytest.approx([0.875, 0.125])
    assert found.by_task == [pytest.approx([0.75, 0.25]), pytest.approx([1, 0])]
    assert found.entropy == pytest.approx(entropy(0.25, 0.75) / 2)


def test_gates_that_are_no_shares_have_the_entropy_of_their_shares():
    counter = RoutingCounter(Routing())
    counter("up", 4 * GATE[:1], None)
    counter("few", 0.01 * GATE[:1], None)
    counter("none", torch.zeros(1, 2), None)
    counter("one", torch.ones(3, 1), None)
    found = counter.result()
    assert found["up"].load == [3, 1]
    assert found["up"].entropy == pytest.approx(entropy(0.25, 0.75))
    assert found["few"].entropy == pytest.approx(entropy(0.25, 0.75))
    assert (found["none"].load, found["none"].entropy, found["none"].dead) == ([0, 0], 0, [0, 1])
    assert (found["one"].load, found["one"].entropy) == ([1], 0)


def test_shares_and_the_dead():
    routing = LayerRouting(load=[0.6, 0.375, 0.02, 0.005], by_task=[], entropy=0.5)
    assert routing.shares == pytest.approx([2.4, 1.5, 0.08, 0.02])
    assert routing.dead == [2, 3]
    assert LayerRouting(load=[0.95, 0.05], by_task=[], entropy=0.5).dead == []
    assert LayerRouting(load=[0.0, 0.0], by_task=[], entropy=0.0).shares == [0, 0]
