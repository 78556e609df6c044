"""Layers that read the same input (q, k, v; gate, up): what stacking their stems into one product gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multiflora import ops
from multiflora.bench.results import SharedCase
from multiflora.bench.shapes import Shape
from multiflora.bench.timing import Phases, interleave, samples, stopwatch

__all__ = ["Stems", "apart", "measure_shared", "together"]


class Stems(NamedTuple):
    """What one R-LoRA layer reads its input with."""

    A: Tensor
    router: Tensor
    A0: Tensor


def apart(x: Tensor, weights: Sequence[Tensor], stems: Sequence[Stems]) -> list[Tensor]:
    """Each layer's base output, u, logits and u0, layer after layer, as the packed op takes them."""
    made = [ops.stems(x, *own, weight) for own, weight in zip(stems, weights, strict=True)]
    with torch.no_grad():  # the op makes a place for the base output, which its second half fills
        for (y, *_), weight in zip(made, weights, strict=True):
            assert y is not None
            torch.mm(x, weight.t(), out=y)
    return [part for parts in made for part in parts if part is not None]


def together(x: Tensor, weights: Sequence[Tensor], stems: Sequence[Stems]) -> list[Tensor]:
    """The same, with one product for the stems of all layers."""
    A, router, A0 = (torch.cat(parts) for parts in zip(*stems, strict=True))
    _, *small = ops.stems(x, A, router, A0)
    split = [part.chunk(len(stems)) for part in small if part is not None]
    outputs = [(F.linear(x, weight), *(part[i] for part in split)) for i, weight in enumerate(weights)]
    return [part for parts in outputs for part in parts]


def measure_shared(
    layers: Sequence[Shape],
    *,
    tokens: int,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    heads: int = 5,
    rank: int = 8,
    after_round: Callable[[], None] | None = None,
) -> SharedCase:
    """Time the base products and R-LoRA's stems of some layers of one input.

    "apart" takes each layer's stems along with its base product, as the packed op does. "together" has one product for
    all stems, which then stands apart from the base products: it reads x once and not once a layer, and adds one more
    tensor of x's size to the input gradient.

    Args:
        layers: Of one d_in.
        tokens: T.
        dtype: Of x and the frozen weights; stems have float32 weights.
        rounds: Rounds that count.
        device: Where.
        heads: H, which is the number of router rows.
        rank: r, of the stem and the offset.
        after_round: Called after every round.
    """
    torch.manual_seed(0)
    x = torch.randn(tokens, layers[0].d_in, dtype=dtype, device=device, requires_grad=True)
    weights = [torch.randn(layer.d_out, layer.d_in, dtype=dtype, device=device) for layer in layers]
    stems = [Stems(*(torch.randn(rows, layer.d_in, device=device) for rows in (rank, heads, rank))) for layer in layers]
    for own in stems:
        own.A.requires_grad_(), own.router.requires_grad_()

    def timed(forward: Callable[[], list[Tensor]]) -> Callable[[], Phases]:
        def run() -> Phases:
            for leaf in (x, *(part for own in stems for part in own)):
                leaf.grad = None
            lap = stopwatch(device)
            made = forward()
            phases = {"forward": lap()}
            torch.autograd.backward(made, [part.detach() for part in made])
            return {**phases, "backward": lap()}

        return run

    competitors = {
        "apart": timed(lambda: apart(x, weights, stems)),
        "together": timed(lambda: together(x, weights, stems)),
    }
    return SharedCase(
        model=layers[0].model,
        layers=" + ".join(f"{layer.layer} {layer.d_in}→{layer.d_out}" for layer in layers),
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        seconds=samples(interleave(competitors, rounds, after_round=after_round, warmup=2)),
    )
