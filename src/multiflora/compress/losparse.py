r"""LoSparse: a weight as a low-rank part plus whole rows of what is left (Li et al. 2023, arXiv 2306.11222).

.. math::
    W \approx L R + S, \qquad L R = U_k \Sigma_k V_k^\top, \qquad S = W - L R \text{ at the start}

All three are trained, and while they are, rows of S (output neurons) are set to zero: those whose importance is least
among all layers, until a share ``keep`` of S is left. The importance of a number is that of PLATON (arXiv 2206.12562),

.. math::
    I = |s \cdot \partial L/\partial s|, \quad \bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I, \quad
    \bar U \leftarrow \beta_2 \bar U + (1-\beta_2) |I - \bar I|, \quad \text{score} = \bar I\, \bar U

and that of a row is the mean over its numbers. With :math:`\beta_2 = 1`, the published script's and the default here,
the uncertainty is switched off: the score is :math:`\bar I` alone. How much is left follows a cubic schedule. Pure
functions on tensors.

Differs from the published code: there I is first averaged over the steps from one pruning to the next (``deltaT``), and
that mean enters :math:`\bar I` once; here every step enters it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Averages", "decompose", "kept_rank", "kept_rows", "remaining", "update"]


def kept_rank(low_rank: float, d_out: int, d_in: int) -> int:
    r"""The rank k at which L and R hold a share ``low_rank`` of the weight: :math:`\lceil \rho HW/(H+W) \rceil`.

    Example:
        >>> kept_rank(0.05, 768, 768)
        20
    """
    return math.ceil(low_rank * d_out * d_in / (d_out + d_in))


def decompose(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """L (d_out, k), R (k, d_in) and S (d_out, d_in), whose L R + S is the weight; L and R share the singular values."""
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = sigma[:rank].sqrt()
    L, R = U[:, :rank] * root, root.unsqueeze(1) * Vh[:rank]
    return L, R, weight - L @ R


def remaining(step: int, steps: int, *, keep: float, start: float, end: float) -> float:
    r"""The share of S that is left after a step: 1, then falling with a cube, then ``keep``.

    .. math:: v = v_T + (1 - v_T) \left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^3

    Args:
        step: Optimiser steps done.
        steps: All of them (T).
        keep: The share in the end.
        start: Share of the steps before anything is taken away.
        end: Share of the steps after all is taken away.

    Example:
        >>> [remaining(step, 100, keep=0.2, start=0.1, end=0.4) for step in (10, 35, 60)]
        [1.0, 0.3, 0.2]
    """
    first, last = start * steps, steps - end * steps
    if step <= first:
        return 1.0
    if step >= last:
        return keep
    return keep + (1 - keep) * (1 - (step - first) / (last - first)) ** 3


class Averages(NamedTuple):
    """Running means over the steps, both of S's shape."""

    importance: Tensor
    uncertainty: Tensor

    def rows(self) -> Tensor:
        """The score of each row, (d_out,)."""
        return (self.importance * self.uncertainty).mean(1)


def update(averages: Averages, values: Tensor, gradient: Tensor, *, beta1: float, beta2: float) -> Averages:
    """The running means after one more step; with ``beta2`` 1 the uncertainty is 1 for all."""
    now = (values * gradient).abs()
    importance = beta1 * averages.importance + (1 - beta1) * now
    if beta2 == 1:
        return Averages(importance, torch.ones_like(importance))
    return Averages(importance, beta2 * averages.uncertainty + (1 - beta2) * (now - importance).abs())


def kept_rows(scores: Sequence[Tensor], widths: Sequence[int], share: float) -> list[Tensor]:
    """Which rows are kept, (d_out,) for each layer, so that at most a share of all numbers is left.

    Args:
        scores: Score of each row, (d_out,), of each layer; layers compete with one another.
        widths: d_in of each layer: how many numbers a row has.
        share: How much is left of all layers' S together.

    Example:
        >>> kept_rows([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [4, 4], 0.7)
        [tensor([ True, False]), tensor([True])]
    """
    every = torch.cat([score.float() for score in scores])
    sizes = torch.cat(
        [torch.full((len(s),), float(w), device=every.device) for s, w in zip(scores, widths, strict=True)]
    )
    order = every.argsort(descending=True, stable=True)
    kept = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    kept[order] = sizes[order].double().cumsum(0) <= share * sizes.double().sum() + 1e-6
    return list(torch.split_with_sizes(kept, [len(score) for score in scores]))
