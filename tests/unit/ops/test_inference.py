"""The sum without gradients: compiled code against its definition, and the number that any changed bit changes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from multiflora import ops
from multiflora.ops import native

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}
SHAPES = [(7, 5, 1, 1), (24, 40, 3, 2), (33, 17, 5, 3), (65, 129, 3, 8), (576, 192, 2, 8)]
"""(d_in, d_out, heads, rank)"""
GATES = ["none", "router", "top_k", "given"]
TOKENS = (1, 2, 3, 5, 8, 16, 17, 33, 70)

needs_compiled = pytest.mark.skipif(
    native.serve(torch.zeros(1)) is None, reason="there is no compiled library on this machine"
)


def made(shape, gate, dtype, *, own, offset, seed=0):
    d_in, d_out, heads, rank = shape
    generator = torch.Generator().manual_seed(seed)
    stems, frozen, logits = rank * (heads if own else 1), rank * offset, heads * (gate in ("router", "top_k"))

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).div(size[-1] ** 0.5).to(dtype)

    return ops.Prepared(
        randn(stems + logits + frozen, d_in),
        randn(heads * rank + frozen, d_out),
        heads,
        rank,
        routed=logits > 0,
        top_k=2 if gate == "top_k" and heads > 2 else 0,
    )


def plainly(x, prepared, y, gate):
    """The equation in float64, head by head."""
    rows, columns, heads, rank, routed, top_k = prepared
    rows, columns, x = rows.double(), columns.double(), x.reshape(-1, x.shape[-1]).double()
    offset = len(columns) - heads * rank
    stems = rows[: len(rows) - offset - heads * routed]
    if routed:
        logits = x @ rows[len(stems) : len(stems) + heads].t()
        if top_k:
            logits = logits.where(logits >= logits.topk(top_k).values[:, -1:], -torch.inf)
        gate = logits.softmax(-1)
    out = y.reshape(-1, y.shape[-1]).double()
    for h in range(heads):
        A = stems[h * rank : (h + 1) * rank] if len(stems) > rank else stems
        weight = 1.0 if gate is None else gate[:, h : h + 1].double()
        out = out + weight * (x @ A.t()) @ columns[h * rank : (h + 1) * rank]
    if offset:
        out = out + x @ rows[-offset:].t() @ columns[heads * rank :]
    return out.view(y.shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiled), False], ids=["C++", "Python"])
def test_it_is_the_equation(shape, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "serve", lambda x: None)
    d_in, d_out, heads, _ = shape
    for gate, own, offset in product(GATES, (False, True), (False, True)):
        prepared = made(shape, gate, dtype, own=own, offset=offset)
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(1, tokens, d_in, generator=generator, dtype=torch.float64).to(dtype)
            y = torch.randn(1, tokens, d_out, generator=generator, dtype=torch.float64).to(dtype)
            weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).div(d_in**0.5).to(dtype)
            bias = torch.randn(d_out, generator=generator, dtype=torch.float64).to(dtype)
            given = torch.rand(tokens, heads, generator=generator) if gate == "given" else None
            before, where = y.clone(), f"{gate}, own stems {own}, offset {offset}, {tokens} tokens"
            on_base = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
            with torch.no_grad():
                found = ops.infer(x, prepared, y=y, gate=given)
                along = ops.infer(x, prepared, (x, weight, bias), gate=given)
                bare = ops.infer(x, prepared, (x, weight, None), gate=given)
            assert torch.equal(y, before), f"the base output was written to: {where}"
            for out, wanted in (
                (found, plainly(x, prepared, y, given)),
                (along, plainly(x, prepared, on_base, given)),
                (bare, plainly(x, prepared, on_base - bias.double(), given)),
            ):
                assert out.shape == y.shape
                assert out.dtype == dtype
                error = (out.double() - wanted).abs().max() / wanted.abs().max()
                assert error < TOLERANCE[dtype], f"{error:.1e}: {where}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiled), False], ids=["C++", "Python"])
def test_each_expert_has_branches_of_its_own(shape, dtype, compiled, monkeypatch):
    """Experts without a token, with one, with some, and with so many that a library multiplies."""
    if not compiled:
        monkeypatch.setattr(native, "serve", lambda x: None)
    d_in, d_out, heads, _ = shape
    ends = torch.tensor([0, 1, 1, 6, 76], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(76, width, generator=generator, dtype=torch.float64).to(dtype) for width in (d_in, d_out))
    gates = [gate for gate in GATES if gate != "top_k" or dtype != torch.bfloat16]  # rounded, another may be the k-th
    for gate, own, offset in product(gates, (False, True), (False, True)):
        each = [made(shape, gate, dtype, own=own, offset=offset, seed=seed) for seed in range(len(ends))]
        together = each[0]._replace(
            rows=torch.stack([one.rows for one in each]), columns=torch.stack([one.columns for one in each])
        )
        given = torch.rand(76, heads, generator=generator) if gate == "given" else None
        with torch.no_grad():
            found = ops.infer_experts(x, together, y.clone(), ends, gate=given)
            none = ops.infer_experts(x[:0], together, y[:0].clone(), torch.zeros_like(ends), gate=None)
        spans = zip([0, *ends.tolist()[:-1]], ends.tolist(), each, strict=True)
        wanted = torch.cat(
            [plainly(x[i:j], one, y[i:j], None if given is None else given[i:j]) for i, j, one in spans if j > i]
        )
        assert found.dtype == dtype
        assert none.shape == (0, d_out)
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype], f"{error:.1e}: {gate}, own stems {own}, offset {offset}"


@needs_compiled
def test_tokens_that_do_not_lie_together_by_expert_are_refused():
    prepared = made(SHAPES[1], "none", torch.float32, own=False, offset=True)
    prepared = prepared._replace(rows=prepared.rows.expand(2, -1, -1).clone(), columns=prepared.columns.repeat(2, 1, 1))
    for ends in ([3, 2], [2, 5]):
        with pytest.raises(RuntimeError, match="do not lie together by expert"):
            ops.infer_experts(torch.zeros(4, 24), prepared, torch.zeros(4, 40), torch.tensor(ends, dtype=torch.int32))


@needs_compiled
def test_no_tokens_are_no_output():
    prepared = made(SHAPES[1], "router", torch.float32, own=False, offset=True)
    assert ops.infer(torch.zeros(0, 24), prepared, y=torch.zeros(0, 40)).shape == (0, 40)


@needs_compiled
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.int64], ids=str)
def test_any_bit_changes_the_digest(dtype):
    tensors = [torch.arange(1, count + 1).to(dtype) for count in (1, 3, 67)]
    whole = ops.digest(tensors)
    seen = {whole}
    for tensor in tensors:
        flat = tensor.view(torch.uint8)
        for byte, bit in product(range(len(flat)), range(8)):
            flat[byte] ^= 1 << bit
            seen.add(ops.digest(tensors))
            flat[byte] ^= 1 << bit
    assert ops.digest(tensors) == whole
    assert len(seen) == 1 + 8 * sum(tensor.nbytes for tensor in tensors)
    assert ops.digest(tensors[::-1]) != whole


@needs_compiled
def test_what_is_not_contiguous_has_no_digest():
    assert ops.digest([torch.zeros(3, 2).t()]) is None
    assert ops.digest([torch.zeros(3, 2)]) is not None
