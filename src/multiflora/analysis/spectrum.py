r"""Singular values of an update, without ever building it. Pure functions.

An update of low rank comes as two factors, :math:`\Delta W = B A` with B (d_out, k) and A (k, d_in). With thin QR
factorisations :math:`B = Q_B R_B` and :math:`A^\top = Q_A R_A`,

.. math:: \Delta W = Q_B \,(R_B R_A^\top)\, Q_A^\top,

so the singular value decomposition of the k x k core is all that is needed, and it is exact: O((d_out + d_in) k²)
instead of O(d_out d_in min(d_out, d_in)). MultiLoRA (arXiv 2311.11501) compares such spectra.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Spectrum", "chance_similarity", "cumulative_energy", "low_rank_svd", "measure", "subspace_similarity"]


def low_rank_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of B A.

    Args:
        B: (d_out, k).
        A: (k, d_in).

    Returns:
        U (d_out, m), the singular values (m,) in descending order, and V (d_in, m), with m the smallest of k, d_out and
        d_in; in float64, as small singular values drown in rounding otherwise.

    Example:
        >>> U, S, V = low_rank_svd(torch.eye(3, 2), torch.eye(2, 4))
        >>> S
        tensor([1., 1.], dtype=torch.float64)
    """
    q_b, r_b = torch.linalg.qr(B.to(torch.float64))
    q_a, r_a = torch.linalg.qr(A.to(torch.float64).t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ u, s, q_a @ vh.t()


def cumulative_energy(singular: Tensor) -> Tensor:
    r"""Share of the update's squared Frobenius norm in the first i directions, for each i.

    .. math:: E_i = \sum_{j \le i} \sigma_j^2 \Big/ \sum_j \sigma_j^2

    Example:
        >>> cumulative_energy(torch.tensor([2.0, 1.0, 0.0]))
        tensor([0.8000, 1.0000, 1.0000])
    """
    energy = singular.square()
    total = energy.sum()
    return energy.cumsum(0) / total if total > 0 else torch.ones_like(energy)


class Spectrum(NamedTuple):
    """What a spectrum looks like, in five numbers."""

    norm: float
    """Frobenius norm of the update."""
    top_share: float
    """Share of its energy in the first direction."""
    entropy: float
    """Entropy of the singular values over their sum, divided by the log of their number: 1 is flat."""
    effective_rank: float
    """exp of the entropy: as many equal directions would have it (Roy and Vetterli 2007)."""
    stable_rank: float
    """Squared Frobenius norm over the squared largest singular value: at most the rank."""


def measure(singular: Tensor) -> Spectrum:
    r"""Sum up a spectrum.

    .. math::
        p_i = \sigma_i / \textstyle\sum_j \sigma_j, \quad H = -\sum_i p_i \log p_i, \quad
        r_\text{eff} = e^H, \quad r_\text{stable} = \|\Delta W\|_F^2 / \sigma_1^2

    Args:
        singular: Singular values in descending order. All zero (an adapter at its start): every measure is 0.

    Example:
        >>> measure(torch.ones(4))
        Spectrum(norm=2.0, top_share=0.25, entropy=1.0, effective_rank=4.0, stable_rank=4.0)
    """
    values = singular.to(torch.float64)
    total, largest = float(values.sum()), float(values.max()) if len(values) else 0.0
    if largest == 0:
        return Spectrum(0.0, 0.0, 0.0, 0.0, 0.0)
    p = values[values > 0] / total
    entropy = float(-(p * p.log()).sum())
    energy = float(values.square().sum())
    return Spectrum(
        norm=math.sqrt(energy),
        top_share=largest**2 / energy,
        entropy=entropy / math.log(len(values)) if len(values) > 1 else 1.0,
        effective_rank=math.exp(entropy),
        stable_rank=energy / largest**2,
    )


def subspace_similarity(U1: Tensor, U2: Tensor) -> Tensor:
    r"""How much of the i leading directions of one update lies in the j leading directions of another.

    .. math:: \varphi(i, j) = \| U_1[:, :i]^\top U_2[:, :j] \|_F^2 \big/ \min(i, j) \in [0, 1]

    As in LoRA (arXiv 2106.09685, section 7). 1: the smaller subspace lies within the larger.

    Args:
        U1: Left singular vectors (d, m), orthonormal.
        U2: Those of the other (d, n).

    Returns:
        (m, n), entry [i-1, j-1] being φ(i, j).

    Example:
        >>> subspace_similarity(torch.eye(3, 2), torch.eye(3)[:, [0, 2]])
        tensor([[1.0000, 1.0000],
                [1.0000, 0.5000]])
    """
    overlap = (U1.t() @ U2).square().cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, device=overlap.device).unsqueeze(1)
    j = torch.arange(1, overlap.shape[1] + 1, device=overlap.device).unsqueeze(0)
    return overlap / torch.minimum(i, j)


def chance_similarity(i: int, j: int, d: int) -> float:
    """Mean of φ(i, j) for random subspaces of a space of d dimensions: max(i, j)/d."""
    return max(i, j) / d
