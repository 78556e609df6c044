r"""What a routed layer does to real inputs, in a small matrix: enough to average its gate, to fit, to know the error.

A routed layer adds :math:`\Delta(x) = s\sum_h g_h(x)\,B_h A_{\sigma(h)}x - s\,\bar B^0A^0x`. Put

.. math:: f = [g_1 A_{\sigma(1)}x;\dots;g_H A_{\sigma(H)}x], \quad v = [Ax;\,A^0x], \quad w = [f; v]

and where a matrix M stands between stems and heads, M A x in place of A x in f. Then :math:`\Delta = C w` with a
constant C, and every plain LoRA on the same stems is :math:`\hat\Delta = \hat C w` with another. So the mean of
:math:`w w^\top`, a few dozen numbers squared, holds :math:`\mathbb E\lVert\Delta-\hat\Delta\rVert^2` for all of them,
and no activation has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multiflora.methods.base import Method
from multiflora.methods.middle import ONE_LAYER, Made

__all__ = ["Moments", "features", "relative_error", "routed_coefficients"]


@dataclass
class Moments:
    """Sums over tokens at one layer."""

    tokens: int
    gate: Tensor
    """Sum of the gates, (H,)."""
    second: Tensor
    """Sum of w wᵀ, (n, n), float64."""
    output: float
    """Sum of ‖y‖², y being the layer's whole output."""
    blend: Tensor | None = None
    """Sum of the weights of what a router blends between stems and heads, (n,), where there is one."""

    def add(self, other: Moments) -> Moments:
        """The sums over both sets of tokens."""
        return Moments(
            self.tokens + other.tokens,
            self.gate + other.gate,
            self.second + other.second,
            self.output + other.output,
            None if self.blend is None or other.blend is None else self.blend + other.blend,
        )

    def cpu(self) -> Moments:
        """The same, on the processor."""
        blend = None if self.blend is None else self.blend.cpu()
        return replace(self, gate=self.gate.cpu(), second=self.second.cpu(), blend=blend)

    @property
    def mean_gate(self) -> Tensor:
        """Mean weight of each head, (H,)."""
        return self.gate / self.tokens

    @property
    def mean_blend(self) -> Tensor | None:
        """Mean weight of each of what is blended, (n,)."""
        return None if self.blend is None else self.blend / self.tokens


def features(
    method: Method, config: Any, parts: Mapping[str, Tensor], x: Tensor, y: Tensor, by_token: Tensor | None = None
) -> Moments:
    """The moments of some tokens.

    Args:
        method: A method with a token router.
        config: The adapter's config.
        parts: The layer's tensors.
        x: The layer's inputs, (T, d_in).
        y: The layer's outputs, (T, d_out).
        by_token: The gate, (H, T), where it is not the router's on x.
    """
    x = x.to(torch.float32)
    wide = {name: part.detach().to(torch.float32) for name, part in parts.items()}
    u = x @ wide["A"].t()
    reads = "router" in wide and by_token is None
    made = Made(u.t(), wide["router"] @ x.t() if reads else None, None, 1.0)
    v, logits = method.inner(config, wide, made, ONE_LAYER)
    if by_token is None:
        by_token = method.gate.weights(config, wide, logits, None)
    gate = x.new_ones(len(x), method.heads(config)) if by_token is None else by_token.t().to(x.dtype)
    blend = None if method.middle is None else method.middle.weights(config, wide, made, ONE_LAYER)
    by_head = v.t().reshape(len(x), 1 if method.shared_stem else gate.shape[1], -1)
    f = (gate.unsqueeze(-1) * by_head).reshape(len(x), -1)
    start = (x @ wide["A0"].t(),) if "A0" in wide else ()
    w = torch.cat((f, u, *start), 1).double()
    summed = None if blend is None else blend.double().sum(1)
    return Moments(len(x), gate.double().sum(0), w.t() @ w, float(y.double().square().sum()), summed)


def routed_coefficients(method: Method, config: Any, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """C of the routed layer, (d_out, n): on f the heads, on Ax nothing, on A⁰x the offset."""
    wide = {name: part.detach().double() for name, part in parts.items()}
    B = method.gate.fold(config, wide, wide["B"])
    start = (-wide["B0"],) if "B0" in wide else ()
    return scale * torch.cat((B, B.new_zeros(B.shape[0], wide["A"].shape[0]), *start), 1)


def relative_error(C: Tensor, other: Tensor, moments: Moments) -> tuple[float, float]:
    r"""Root mean square error of ``other`` on the inputs seen, relative to the update and to the layer's whole output.

    Args:
        C: Coefficients of the update that is asked for, (d_out, n).
        other: Those of its replacement.
        moments: Sums over the inputs.
    """
    error, update = (float(((D.t() @ D) * moments.second).sum().clamp(min=0)) for D in (C - other, C))
    return (error / update) ** 0.5 if update > 0 else 0.0, (error / moments.output) ** 0.5 if moments.output else 0.0
