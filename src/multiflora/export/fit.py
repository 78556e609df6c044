r"""One matrix in place of a routed update: the gate's mean, or the closest there is on real inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from multiflora.export.moments import Moments, routed_coefficients
from multiflora.methods.base import Method

__all__ = ["averaged", "coefficients", "fitted"]

RIDGE = 1e-4
"""Pull of the fit towards the mean gate, relative to the mean square of the stems' outputs. Directions that the
examples barely show stay where the mean gate put them; on the others it changes nothing that can be measured."""


def averaged(
    method: Method, config: Any, parts: Mapping[str, Tensor], scale: float, moments: Moments
) -> tuple[Tensor, Tensor]:
    r"""A' and B' with each head weighted by its mean gate, :math:`\bar g = \mathbb E[g(x)]`."""
    return method.factors(config, parts, moments.mean_gate.to(torch.float32), scale, blend=moments.mean_blend)


def fitted(
    method: Method, config: Any, parts: Mapping[str, Tensor], scale: float, moments: Moments
) -> tuple[Tensor, Tensor]:
    r"""A' as in `averaged`, and the B' that minimises the error of the layer's output on the inputs seen.

    .. math::
        B' = \bar B + \left(C\,\mathbb E[w v^\top] - \bar B\,\mathbb E[v v^\top]\right)
             \left(\mathbb E[v v^\top] + \lambda I\right)^{-1}

    least squares in closed form, with a slight pull towards the mean gate's :math:`\bar B`.
    """
    A, B = averaged(method, config, parts, scale, moments)
    k = A.shape[0]
    mean = moments.second / moments.tokens
    cross, gram = mean[:, -k:], mean[-k:, -k:]
    C = routed_coefficients(method, config, parts, scale)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(k, dtype=gram.dtype)
    if not gram.any():
        return A, B  # the stems are silent on these inputs: there is nothing to fit
    residual = C @ cross - B.double() @ gram
    step = torch.linalg.solve(gram + ridge, residual.t()).t()
    return A, (B.double() + step).to(B.dtype)


def coefficients(A: Tensor, B: Tensor, stems: Tensor, width: int) -> Tensor:
    """The Ĉ of a plain LoRA whose A' lies in the span of the stems, (d_out, width); see `multiflora.export.moments`.

    Args:
        A: (k, d_in).
        B: (d_out, k).
        stems: The layer's own A' (all stems and the offset's), (m, d_in).
        width: n, the length of w; its last m entries are the stems' outputs.
    """
    if A is stems:
        on_stems = B.double()
    else:
        mix = torch.linalg.lstsq(stems.double().t(), A.double().t(), driver="gelsd").solution
        on_stems = B.double() @ mix.t()
    return torch.cat((on_stems.new_zeros(B.shape[0], width - stems.shape[0]), on_stems), 1)
