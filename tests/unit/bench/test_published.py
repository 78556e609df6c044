"""The benchmark's opponent computes what it stands for, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multiflora import ops
from multiflora.bench.layers import competitor
from multiflora.bench.published import PublishedLoop

HEADS, RANK, SCALE = 3, 4, 0.5


@pytest.fixture
def layer():
    torch.manual_seed(0)
    base = nn.Linear(10, 14, bias=False).requires_grad_(False)
    loop = PublishedLoop(base, HEADS, RANK, SCALE, dropout=0.0).double()
    for parameter in loop.parameters():
        parameter.data.normal_()
    return loop


def test_it_equals_the_reference_loop_in_values_and_gradients(layer):
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 14, dtype=torch.float64)
    y = layer(x)
    y.backward(grad)
    # the gate is softmaxed in float32 there, as in the code it stands for
    gate = torch.softmax(layer.router(x), -1, dtype=torch.float32).double()
    A, router = layer.A.weight.detach().requires_grad_(), layer.router.weight.detach().requires_grad_()
    B = torch.cat([head.weight.detach() for head in layer.B], 1).requires_grad_()
    x2 = x.detach().requires_grad_()
    gate = torch.softmax(x2 @ router.t(), -1, dtype=torch.float32).double()
    y2 = ops.loop(layer.base(x2), x2, A, gate, B, None, None, num_heads=HEADS, rank=RANK, scale=SCALE)
    y2.backward(grad)
    torch.testing.assert_close(y, y2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.A.weight.grad, A.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.router.weight.grad, router.grad, rtol=1e-6, atol=1e-6)
    for head, expected in zip(layer.B, B.grad.chunk(HEADS, 1), strict=True):
        torch.testing.assert_close(head.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_with_the_weights_of_a_packed_layer_it_differs_by_the_offset_alone():
    base = nn.Linear(10, 14, bias=False).requires_grad_(False)
    packed = competitor("packed", base, heads=HEADS, rank=RANK, dropout=0.0)
    loop = competitor("loop", base, heads=HEADS, rank=RANK, dropout=0.0, like=packed)
    parts = packed.parts("default")
    x = torch.randn(6, 10)
    offset = loop.scale * (x @ parts["A0"].t()) @ parts["B0"].t()
    torch.testing.assert_close(loop(x) - offset, packed(x), rtol=1e-4, atol=1e-5)


def test_every_head_has_a_mask_of_its_own():
    base = nn.Linear(10, 14, bias=False).requires_grad_(False)
    loop = PublishedLoop(base, HEADS, 64, SCALE, dropout=0.5)
    seen = []
    for head in loop.B:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0] == 0))
    loop(torch.randn(4, 10))
    assert len(seen) == HEADS
    assert not torch.equal(seen[0], seen[1])
