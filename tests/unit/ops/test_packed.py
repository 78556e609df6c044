"""What the packed op keeps for its backward pass, and that the loop can be asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multiflora import ops
from multiflora.bench.memory import kept_bytes
from multiflora.bench.published import PublishedLoop
from multiflora.context import find, reference_loop
from multiflora.ops import native

HEADS, RANK = 5, 8


def layer_of(base: nn.Linear, **words):
    from peft import get_peft_model

    import multiflora

    settings = {"r": RANK, "num_heads": HEADS, "head_dropout": 0.1, "target_modules": ["0"]} | words
    return get_peft_model(nn.Sequential(base), multiflora.RLoraConfig(**settings)).train()


def kept(module: nn.Module, x: torch.Tensor) -> int:
    return kept_bytes(lambda: module(x), [x, *module.parameters(), *module.buffers()])


def frozen(d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=False, device="meta").to_empty(device="cpu").requires_grad_(False)


def test_keeps_u_and_the_gate_and_no_more():
    x = torch.randn(64, 24, requires_grad=True)
    # stem, router and offset rows of u, and the gate; neither the mask nor a copy of any weight
    assert kept(layer_of(frozen(24, 40)), x) == 64 * 4 * ((2 * RANK + HEADS) + HEADS)


def test_a_hundredth_of_the_published_loop():
    base, x = frozen(4096, 11008), torch.zeros(16, 4096, requires_grad=True)
    loop = PublishedLoop(base, HEADS, RANK, 1.0, 0.1).train()
    assert kept(layer_of(base), x) <= 0.01 * kept(loop, x)


def test_weights_in_half_precision_are_not_kept_twice():
    x = torch.randn(64, 24, dtype=torch.bfloat16, requires_grad=True)
    base = frozen(24, 40).to(torch.bfloat16)
    assert kept(layer_of(base), x) == 64 * (2 * (2 * RANK + HEADS) + 4 * HEADS)


@pytest.mark.parametrize("way", ["compiled", "python"])
@pytest.mark.parametrize("tokens", [0, 1, 128, 300])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("given", ["base", "y"])
def test_dropout_on_x_block_by_block_is_that_of_the_whole(given, routed, tokens, way, monkeypatch):
    if way == "python":
        monkeypatch.setattr(native, "serve", lambda x: None)
    x, A, R, B, W = (torch.randn(*shape).double() for shape in ((tokens, 21), (4, 21), (3, 21), (13, 12), (13, 21)))
    leaves = [leaf.requires_grad_() for leaf in (x, A, B, *((R,) if routed else ()))]
    y, base = (None, (x, W, None)) if given == "base" else (torch.zeros(tokens, 13).double(), None)
    router = R if routed else None
    packed, _ = ops.branches(
        x, A, router, None, B, None, y, base, num_heads=3, rank=4, scale=2.0, stem_dropout=(0.3, 5)
    )
    u = 2 * (x * ops.dropout_mask((tokens, 21), 0.3, 5, dtype=torch.float64)) @ A.t()
    gate = (x @ R.t()).softmax(1) if routed else torch.ones(tokens, 3).double()
    plain = (gate.unsqueeze(2) * u.unsqueeze(1)).reshape(tokens, 12) @ B.t()
    plain = plain + x @ W.t() if base else plain
    grads = [torch.autograd.grad(sum_.square().sum(), leaves) for sum_ in (packed, plain)]
    for mine, whole in zip((packed, *grads[0]), (plain, *grads[1]), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10)


def test_what_dropout_drops_is_not_looked_at():
    """A dropped NaN is gone; multiplied with 0 it would spread."""
    seed, x = 5, torch.ones(300, 4)
    x[ops.dropout_mask((300, 4), 0.5, seed) == 0] = torch.nan
    _, u, _, _ = ops.stems(x, torch.ones(1, 4), None, None, dropout=(0.5, seed))
    assert u.isfinite().all()


def test_reference_loop_is_chosen_inside_only(monkeypatch):
    model, x, calls = layer_of(nn.Linear(6, 4)), torch.randn(3, 6), []
    monkeypatch.setattr(ops, "loop", lambda y, *a, _loop=ops.loop, **b: calls.append(1) or _loop(y, *a, **b))
    torch.manual_seed(1)
    packed = model(x)
    assert not calls
    torch.manual_seed(1)
    with reference_loop(model):
        looped = model(x)
    assert calls
    assert not find(model).loop
    torch.testing.assert_close(packed, looped)


def test_reference_loop_ends_with_an_error():
    model = layer_of(nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match="shapes"), reference_loop(model):
        model(torch.randn(3, 5))
    assert not find(model).loop
