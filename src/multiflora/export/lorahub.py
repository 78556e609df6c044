r"""LoraHub: several LoRAs blended by a few weights, which are searched on a few examples, without gradients.

LoraHub (Huang et al. 2023, arXiv 2307.13269) weighs both factors,

.. math::
    \hat A = \sum_i w_i A_i, \quad \hat B = \sum_i w_i B_i, \qquad
    \min_w\ \operatorname{loss}(\hat B \hat A) + 0.05 \cdot \tfrac1n \sum_i |w_i|, \quad w_i \in [-1.5, 1.5]

so the product has cross terms :math:`w_i w_j B_i A_j`, and all LoRAs must have one rank. The weights start at 0 and
are searched by Nevergrad's NGOpt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from multiflora.errors import EnvironmentProblem
from multiflora.export.plain import Pair

__all__ = ["BOUND", "L1", "Found", "blend", "load_nevergrad", "penalised", "search"]

log = logging.getLogger(__name__)

BOUND = 1.5
"""Largest weight, up or down (LoraHub)."""
L1 = 0.05
"""Weight of the mean absolute weight in the objective (LoraHub)."""


class Found(NamedTuple):
    """What a search came to."""

    weights: tuple[float, ...]
    pairs: list[Pair]
    """The blended factors."""
    loss_before: float
    """That of the base model."""
    loss_after: float


def blend(stacked: Mapping[str, tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float]) -> list[Pair]:
    r"""LoraHub's :math:`\hat A = \sum_i w_i A_i` and :math:`\hat B = \sum_i w_i B_i`, layer by layer.

    Args:
        stacked: All A, (n, r, d_in), and all B, (n, d_out, r), of each layer.
        weights: n of them.
    """

    def mean(factors: torch.Tensor) -> torch.Tensor:
        w = torch.tensor([float(weight) for weight in weights], dtype=factors.dtype, device=factors.device)
        return torch.einsum("n,nij->ij", w, factors)

    return [Pair(name, mean(A), mean(B)) for name, (A, B) in stacked.items()]


def penalised(loss: float, weights: Sequence[float]) -> float:
    r"""LoraHub's objective: the few-shot loss plus :math:`0.05 \cdot \tfrac1n \sum_i |w_i|`."""
    return loss + L1 * sum(abs(float(weight)) for weight in weights) / len(weights)


def search(
    loras: Sequence[Sequence[Pair]], loss: Callable[[Sequence[Pair]], float], *, budget: int, seed: int
) -> Found:
    """Search the weights.

    Args:
        loras: The factors of each LoRA, the same layers in the same order and shapes.
        loss: That of the model with these factors; with none, that of the base model.
        budget: How often it may be asked.
        seed: Of the search.

    Raises:
        EnvironmentProblem: The package nevergrad is not installed.
    """
    ng = load_nevergrad()
    stacked = {
        same[0].name: (torch.stack([pair.A for pair in same]), torch.stack([pair.B for pair in same]))
        for same in zip(*loras, strict=True)
    }
    before = loss([])

    def objective(weights: Any) -> float:
        value = penalised(loss(blend(stacked, weights)), weights)
        log.info("loss %.4f with weights %s", value, " ".join(f"{weight:+.2f}" for weight in weights))
        return value

    space = ng.p.Array(init=[0.0] * len(loras), lower=[-BOUND] * len(loras), upper=[BOUND] * len(loras))
    space.random_state.seed(seed)
    found = ng.optimizers.NGOpt(parametrization=space, budget=budget).minimize(objective)
    weights = tuple(float(weight) for weight in found.value)
    pairs = blend(stacked, weights)
    return Found(weights, pairs, before, loss(pairs))


def load_nevergrad() -> Any:
    """The package that searches.

    Raises:
        EnvironmentProblem: It is not installed.
    """
    try:
        import nevergrad  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise EnvironmentProblem(
            "Searching weights needs the package nevergrad: pip install 'multiflora[compose]'. An exact sum "
            "(`multiflora compose --weights`) needs none."
        ) from error
    return nevergrad
