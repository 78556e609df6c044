r"""The elementwise step between the two products: from what the stems made, what each head reads.

.. math::
    z_h = g_h \; m_h \odot u_{\sigma(h)}

Letters and layouts are those of :mod:`multiflora.ops.packed`; a GPU has kernels of its own for it
(:mod:`multiflora.ops.triton_kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiflora.ops import triton_kernels
from multiflora.ops.mask import Dropout, dropped_levels, head_mask


def blend(u: Tensor, gate: Tensor | None, mask: Tensor | None, *, heads: int, rank: int) -> Tensor:
    r"""The elementwise step :math:`z_h = g_h\,m_h \odot u_{\sigma(h)}`.

    Args:
        u: What the stems made of the input, (K r, T); K is 1 (shared by all heads) or H (one for each).
        gate: One weight per head and token, (H, T), or None for 1.
        mask: Inverted-dropout mask, (H, r, T), or None.
        heads: H.
        rank: r.

    Returns:
        z, (H r, T), in u's dtype.

    Example:
        >>> blend(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [0.25]]), None, heads=2, rank=2).t()
        tensor([[0.5000, 1.0000, 0.2500, 0.5000]])
    """
    z = u.view(len(u) // rank, rank, u.shape[1])
    if gate is not None:
        z = z * gate.to(u.dtype).unsqueeze(1)
    if mask is not None:
        z = z * mask
    return _flat(z, heads)


def blend_backward(
    dz: Tensor, u: Tensor, gate: Tensor | None, mask: Tensor | None, *, heads: int, rank: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of :func:`blend`, and its result once more.

    Args:
        dz: The gradient of z, (H r, T).
        u: As given to :func:`blend`; so are the others.
        gate: See there.
        mask: See there.
        heads: H.
        rank: r.

    Returns:
        The gradient of u, (K r, T); that of the gate, (H, T), or None; z, (H r, T).
    """
    tokens = u.shape[1]
    z, du = u.view(len(u) // rank, rank, tokens), dz.view(heads, rank, tokens)
    shared, dgate = len(z) < heads, None
    if mask is not None:
        du = du * mask
    if gate is not None:
        weight = gate.to(u.dtype).unsqueeze(1)
        dgate = _added((du * z).unbind(1)).to(gate.dtype)
        du, z = du * weight, z * weight
    if mask is not None:
        z = z * mask
    return _added(du.unbind(0)).to(u.dtype) if shared else du.view_as(u), dgate, _flat(z, heads)


def masked_blend(u: Tensor, gate: Tensor | None, sizes: tuple[int, int], dropout: Dropout) -> Tensor:
    """:func:`blend` under the mask of this seed, by a kernel where there is one."""
    heads, rank = sizes
    if triton_kernels.serve(u.device):
        dropped, seed = dropped_levels(dropout[0]), dropout[1]
        return triton_kernels.blend(u, gate, heads=heads, rank=rank, dropped=dropped, seed=seed)
    return blend(u, gate, _heads_mask(u, sizes, dropout), heads=heads, rank=rank)


def masked_blend_backward(
    dz: Tensor, u: Tensor, gate: Tensor | None, sizes: tuple[int, int], dropout: Dropout
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`blend_backward` under the mask of this seed, by a kernel where there is one."""
    heads, rank = sizes
    if triton_kernels.serve(u.device):
        dropped, seed = dropped_levels(dropout[0]), dropout[1]
        return triton_kernels.blend_backward(dz, u, gate, heads=heads, rank=rank, dropped=dropped, seed=seed)
    return blend_backward(dz, u, gate, _heads_mask(u, sizes, dropout), heads=heads, rank=rank)


def _heads_mask(u: Tensor, sizes: tuple[int, int], dropout: Dropout) -> Tensor | None:
    """The mask on each head's input, (H, r, T), or None without dropout."""
    p, seed = dropout
    return head_mask(u.shape[1], *sizes, p, seed, device=u.device, dtype=u.dtype) if p > 0 else None


def _added(rows: Sequence[Tensor]) -> Tensor:
    """Their sum in float32 at least, one after another: torch's order depends on the machine and the place of a row."""
    total = torch.zeros_like(rows[0], dtype=torch.promote_types(rows[0].dtype, torch.float32))
    for row in rows:
        total += row
    return total


def _flat(z: Tensor, heads: int) -> Tensor:
    """(H or 1, r, T) to (H r, T); a single one stands for all heads."""
    return (z if len(z) == heads else z.expand(heads, -1, -1)).reshape(heads * z.shape[1], z.shape[2])
