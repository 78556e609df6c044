r"""Arithmetic on products B A of two thin matrices; the wide product, (d_out, d_in), is never formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["stack", "truncate", "truncate_for"]


def stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""The sum of products as one: :math:`\sum_i B_i A_i = [B_1|B_2|\dots]\,[A_1;A_2;\dots]`, exact.

    Args:
        pairs: (A, B) of shapes (k_i, d_in) and (d_out, k_i).

    Returns:
        A, (Σ k_i, d_in), and B, (d_out, Σ k_i).

    Example:
        >>> A, B = stack([(torch.ones(2, 3), torch.ones(4, 2)), (torch.ones(1, 3), torch.ones(4, 1))])
        >>> tuple(A.shape), tuple(B.shape)
        ((3, 3), (4, 3))
    """
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1)


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    r"""The best product of a smaller rank, by SVD of the factors.

    .. math::
        A^\top = Q_A R_A, \quad B = Q_B R_B, \quad R_B R_A^\top = U \Sigma V^\top
        \quad\Rightarrow\quad BA = (Q_B U)\,\Sigma\,(Q_A V)^\top

    so the SVD of (d_out, d_in) costs two thin QRs and the SVD of a (k, k) matrix. Computed in float64.

    Args:
        A: (k, d_in).
        B: (d_out, k).
        rank: Rank of the result, at least 1; a larger one than there is leaves nothing out.

    Returns:
        A' (rank, d_in), B' (d_out, rank), in the dtypes given, with the singular values shared between them; and the
        share of the energy :math:`\lVert BA\rVert_F^2` that is lost, from 0 to 1.

    Example:
        >>> A, B = torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)
        >>> A1, B1, lost = truncate(A, B, 1)
        >>> round(lost, 3), torch.round(B1 @ A1).tolist()
        (0.1, [[3.0, 0.0], [0.0, 0.0]])
    """
    q_in, r_in = torch.linalg.qr(A.double().t())
    q_out, r_out = torch.linalg.qr(B.double())
    u, sigma, vh = torch.linalg.svd(r_out @ r_in.t())
    sigma = sigma[: min(u.shape[1], vh.shape[0])]
    kept = min(rank, sigma.numel())
    energy = sigma.square()
    total = float(energy.sum())
    lost = float(energy[kept:].sum()) / total if total > 0 else 0.0
    root = sigma[:kept].sqrt()
    small_B = q_out @ (u[:, :kept] * root)
    small_A = (root.unsqueeze(1) * vh[:kept]) @ q_in.t()
    return small_A.to(A.dtype), small_B.to(B.dtype), lost


def truncate_for(A: Tensor, B: Tensor, rank: int, gram: Tensor) -> tuple[Tensor, Tensor, float]:
    r"""The product of a smaller rank that is best *on given inputs*, not over all directions alike.

    .. math::
        \min_{\operatorname{rank} X \le k}\ \mathbb E\lVert (B - X) A x\rVert^2
        = \min\ \lVert (B - X) L\rVert_F^2, \qquad L L^\top = \mathbb E[A x\,(A x)^\top]

    Args:
        A: (k, d_in).
        B: (d_out, k).
        rank: Rank of the result, at least 1.
        gram: Mean of (A x)(A x)ᵀ over the inputs, (k, k).

    Returns:
        A', B' and the share of the output's energy on those inputs that is lost.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    # directions without any input still need a little weight, or they could not be undone again
    root = values.clamp(min=1e-8 * float(values.max().clamp(min=1e-30))).sqrt()
    small, B, lost = truncate((vectors * root) @ vectors.t(), B, rank)
    mix = small @ (vectors / root) @ vectors.t()
    return (mix @ A.double()).to(A.dtype), B, lost
