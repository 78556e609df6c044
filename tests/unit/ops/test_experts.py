"""Grouped products against one product after another, in every dtype and layout, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multiflora import ops
from multiflora.ops import experts

ENDS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight[e] @ token for e, token in zip([0, 0, 0, 2, 2, 2, 2, 3, 3, 3], x, strict=True)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("d_in", "d_out", "native"), [(16, 8, True), (24, 16, True), (7, 3, False), (16, 3, False)])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_each_token_meets_its_own_expert(dtype: torch.dtype, d_in: int, d_out: int, native: bool, turned: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, d_in, dtype=dtype, requires_grad=True)
    stored = torch.randn(4, d_in, d_out, dtype=dtype) if turned else torch.randn(4, d_out, d_in, dtype=dtype)
    stored.requires_grad_()
    weight = stored.mT if turned else stored
    assert experts._is_native(x, weight) == (native and dtype != torch.float64)
    ours, theirs = ops.grouped(x, weight, ENDS), one_by_one(x, weight)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    # a gradient that does not lie row by row, as that of a product's transpose
    direction = torch.randn(d_out, 10, dtype=dtype)
    grads = [torch.autograd.grad((y.t() * direction).sum(), (x, stored)) for y in (ours, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_weight_that_lies_between_two_words_is_multiplied_one_by_one() -> None:
    memory = torch.randn(1 + 4 * 8 * 16)
    weight, x = memory[1:].view(4, 8, 16), torch.randn(10, 16)
    assert weight.data_ptr() % 16
    assert not experts._is_native(x, weight)
    torch.testing.assert_close(ops.grouped(x, weight, ENDS), one_by_one(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_branches_of_an_expert_are_those_of_a_layer_with_its_tensors(
    dtype: torch.dtype, rank: int, routed: bool, offset: bool
) -> None:
    torch.manual_seed(1)
    d_in, d_out, heads = 16, 8, 3
    x, y = torch.randn(10, d_in, dtype=dtype), torch.randn(10, d_out, dtype=dtype)
    A, B = torch.randn(4, heads * rank, d_in, dtype=dtype), torch.randn(4, d_out, heads * rank, dtype=dtype)
    router = torch.randn(4, heads, d_in, dtype=dtype) if routed else None
    A0 = torch.randn(4, rank, d_in, dtype=dtype) if offset else None
    B0 = torch.randn(4, d_out, rank, dtype=dtype) if offset else None
    u, logits, u0 = ops.expert_stems(x, A, router, A0, ENDS, scale=0.5)
    gate = None if logits is None else ops.softmax(logits)
    ours = ops.expert_heads(y, u, u0, gate, B, B0, ENDS, num_heads=heads, rank=rank)
    start = 0
    for e, end in enumerate(ENDS.tolist()):
        own = [None if part is None else part[e] for part in (A, router, A0, B, B0)]
        if end > start:
            theirs, _ = ops.branches(
                x[start:end], *own, y[start:end].clone(), None, num_heads=heads, rank=rank, scale=0.5
            )
            torch.testing.assert_close(ours[start:end], theirs, rtol=1e-5, atol=1e-4)
        start = end
