r"""The packed sum for tokens that are shared out among experts, each with branches of its own.

.. math::
    [u \mid \ell \mid u^0] &= x\,[s A_{e,1}; \dots; s A_{e,K};\; R_e;\; -s A^0_e]^\top \\
    y &\mathrel{+}= [z_1 \dots z_H \mid u^0]\,[B_{e,1} \dots B_{e,H} \mid \bar B^0_e]^\top

e is the expert of the token. Tokens lie together by expert, so each line is one grouped product: many small ones of an
expert's tokens with its own matrix. Letters and layouts are those of :mod:`multiflora.ops.packed`, with an axis of E
experts before a weight's own. Autograd does the rest: with the products grouped, there is little left to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multiflora.ops.elementwise import blend
from multiflora.ops.mask import Dropout, dropout_mask, head_mask

__all__ = ["expert_heads", "expert_stems", "expert_times", "grouped"]

_ALIGNED = 16
"""Bytes that a row must be a multiple of for torch's grouped product."""
WIDTH = 8
"""Columns that narrow matrices are filled up to a multiple of: 16 bytes in half precision."""


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    r"""Each token times the matrix of its expert: :math:`y_t = W_{e(t)}\,x_t`.

    Args:
        x: Tokens by expert, (S, d_in).
        weight: (E, d_out, d_in), in x's dtype.
        ends: Where each expert's tokens end, (E,), int32.

    Returns:
        (S, d_out).

    Example:
        >>> weight = torch.stack((torch.ones(1, 2), torch.zeros(1, 2)))
        >>> grouped(torch.ones(3, 2), weight, torch.tensor([1, 3], dtype=torch.int32)).tolist()
        [[2.0], [0.0], [0.0]]
    """
    if _is_native(x, weight):
        out: Tensor = F.grouped_mm(x.contiguous(), weight.mT, offs=ends)
        if torch.is_grad_enabled():
            out = _RowByRow.apply(out)  # type: ignore[no-untyped-call]
        return out
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])


class _RowByRow(torch.autograd.Function):
    """A tensor whose gradient lies row by row, as torch's grouped product wants it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _is_native(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: it is new, and asks for aligned rows."""
    if not hasattr(F, "grouped_mm") or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not len(x):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    if torch.compiler.is_compiling():
        if x.dtype != torch.bfloat16:
            return False  # which inductor has not learnt
    elif weight.data_ptr() % _ALIGNED:
        return False  # a file's tensor, read where it lies
    size = x.element_size()
    # without a gradient nothing is multiplied by rows of the product
    widths = weight.shape[1:] if torch.is_grad_enabled() else weight.shape[2:]
    strides = (*(stride for stride in weight.stride() if stride != 1), *widths)
    return x.dtype == weight.dtype and all(stride * size % _ALIGNED == 0 for stride in strides)


def expert_stems(
    x: Tensor,
    A: Tensor,
    router: Tensor | None,
    A0: Tensor | None,
    ends: Tensor,
    *,
    scale: float = 1.0,
    dropout: Dropout = (0.0, 0),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Everything that reads x: ``(u, logits, u0)``, as :func:`multiflora.ops.stems` makes them for one layer.

    Args:
        x: Tokens by expert, (S, d_in).
        A: Stems, (E, K r, d_in).
        router: Router rows, (E, H, d_in), or None.
        A0: Frozen stems of the offset, (E, r, d_in), or None.
        ends: Where each expert's tokens end, (E,), int32.
        scale: s.
        dropout: Probability and seed of the mask on what the stems read; router and offset read x as it is.

    Returns:
        u = s A x, (K r, S); the router's logits, (H, S), or None; u0 = -s A0 x, (r, S), or None.
    """
    wide = torch.promote_types(A.dtype, torch.float32)  # weights in half precision are scaled before they are rounded
    scaled = A.to(wide) * scale
    others = [] if router is None else [router]
    others += [] if A0 is None else [A0.to(wide) * -scale]
    if dropout[0] > 0:
        mask = dropout_mask(tuple(x.shape), *dropout, device=x.device, dtype=x.dtype)
        read = [*_read(x * mask, [scaled], ends), *(_read(x, others, ends) if others else ())]
    else:
        read = [*_read(x, [scaled, *others], ends)]
    return read[0], None if router is None else read[1], None if A0 is None else read[-1]


def expert_times(matrix: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """A small matrix of each expert, (E, m, n), times its tokens, (n, S); see :func:`grouped`."""
    return _read(tokens.t(), [matrix], ends)[0]


def _read(x: Tensor, matrices: Sequence[Tensor], ends: Tensor) -> Sequence[Tensor]:
    """Products with several matrices of each expert, in one: (n, S) for each of them."""
    widths = [matrix.shape[1] for matrix in matrices]
    fill = -sum(widths) % WIDTH
    rows = F.pad(torch.cat([matrix.to(x.dtype) for matrix in matrices], 1), (0, 0, 0, fill))
    return torch.split(grouped(x, rows, ends).t(), [*widths, fill])[:-1]


def expert_heads(
    y: Tensor,
    u: Tensor,
    u0: Tensor | None,
    gate: Tensor | None,
    B: Tensor,
    B0: Tensor | None,
    ends: Tensor,
    *,
    num_heads: int,
    rank: int,
    dropout: Dropout = (0.0, 0),
) -> Tensor:
    """Add the branches to the experts' product y, as :func:`multiflora.ops.heads` does for one layer.

    Args:
        y: (S, d_out).
        u: From :func:`expert_stems`, (K r, S).
        u0: The offset's, (r, S), or None.
        gate: (H, S), or None for 1.
        B: Heads side by side, (E, d_out, H r).
        B0: Frozen mean heads of the offset, (E, d_out, r), or None.
        ends: Where each expert's tokens end, (E,), int32.
        num_heads: H.
        rank: r.
        dropout: Probability and seed of the mask on each head's input.

    Returns:
        (S, d_out), in y's dtype.
    """
    mask = None
    if dropout[0] > 0:
        mask = head_mask(u.shape[1], num_heads, rank, *dropout, device=u.device, dtype=u.dtype)
    z = blend(u, gate, mask, heads=num_heads, rank=rank)
    z = z if u0 is None else torch.cat((z, u0))
    columns = (B if B0 is None else torch.cat((B, B0), 2)).to(z.dtype)
    fill = (0, -len(z) % WIDTH)
    return y + grouped(F.pad(z.t(), fill), F.pad(columns, fill), ends).to(y.dtype)
