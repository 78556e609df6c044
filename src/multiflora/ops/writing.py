r"""What writes y: the heads in one product, added into the base layer's output.

.. math::
    y \mathrel{+}= [z_1 \dots z_H \mid u^0]\,[B_1 \dots B_H \mid \bar B^0]^\top

z is what the elementwise step makes of u (:mod:`multiflora.ops.elementwise`). Letters are those of
:mod:`multiflora.ops.packed`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from multiflora.ops import native
from multiflora.ops.elementwise import blend, masked_blend, masked_blend_backward
from multiflora.ops.mask import Dropout
from multiflora.ops.reading import by_token

Base = tuple[Tensor, Tensor, "Tensor | None"]
"""A frozen layer's input, weight and bias."""


def heads(
    y: Tensor,
    u: Tensor,
    u0: Tensor | None,
    gate: Tensor | None,
    B: Tensor,
    B0: Tensor | None,
    base: Base | None = None,
    *,
    num_heads: int,
    rank: int,
    dropout: Dropout = (0.0, 0),
) -> Tensor:
    """Add the branches to the base output: ``y + [blend(u); u0]^T [B | B0]^T``.

    Args:
        y: Output of the base layer, (..., d_out); with ``base``, the place for it that the stems made.
        u: From :func:`multiflora.ops.stems`, (K r, T).
        u0: The offset's, (r, T), or None.
        gate: (H, T) or None for 1.
        B: Heads side by side, (d_out, H r).
        B0: Frozen mean head of the offset, (d_out, r), or None.
        base: x, weight and bias of a frozen base layer whose output is to be computed along.
        num_heads: H.
        rank: r.
        dropout: Probability and seed of the mask on each head's input.

    Returns:
        (..., d_out) in y's dtype.
    """
    sizes = (num_heads, rank)
    if torch.compiler.is_compiling():
        mask = F.dropout(u.new_ones(*sizes, u.shape[1]), dropout[0]) if dropout[0] > 0 else None
        z = blend(u, gate, mask, heads=num_heads, rank=rank)
        z = z if u0 is None else torch.cat((z, u0))
        return y + (z.t() @ _columns(B, B0, z.dtype).t()).to(y.dtype).view(y.shape)
    compiled = native.serve(y)
    if compiled is not None:
        summed: Tensor = compiled.heads(y, u, u0, gate, B, B0, *(base or (None, None, None)), *sizes, *dropout)
        return summed
    out: Tensor = _Heads.apply(y, u, u0, gate, B, B0, sizes, dropout, base)  # type: ignore[no-untyped-call]
    return out


class _Heads(torch.autograd.Function):
    """``(y, u, gate, ...) -> y + z B^T``, keeping u, the gate and the masks' seed.

    With ``base``, the layer's x, weight and bias, y is a place to compute ``W x`` in first; its gradient goes to
    where the place was made (:mod:`multiflora.ops.reading`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        u: Tensor,
        u0: Tensor | None,
        gate: Tensor | None,
        B: Tensor,
        B0: Tensor | None,
        sizes: tuple[int, int],
        dropout: Dropout,
        base: Base | None,
    ) -> Tensor:
        z, columns = masked_blend(u, gate, sizes, dropout), _columns(B, B0, u.dtype)
        # weights are there anyway and are packed once more; a B made on the way (with a scale folded in) is not
        ctx.save_for_backward(u, gate, *((B, B0) if B.is_leaf else (columns, None)))
        ctx.sizes, ctx.dropout, ctx.dtype = sizes, dropout, B.dtype
        if u0 is not None:
            z = torch.cat((z, u0))
        if base is not None:
            ctx.mark_dirty(y)
            _linear(*base, out=y.view(-1, y.shape[-1])).addmm_(z.t(), columns.t())
            return y
        if y.dtype == z.dtype:
            return torch.addmm(by_token(y), z.t(), columns.t()).view(y.shape)
        return y + (z.t() @ columns.t()).to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        u, gate, B, B0 = ctx.saved_tensors
        heads, rank = ctx.sizes
        grad, columns = by_token(dy).to(u.dtype), _columns(B, B0, u.dtype)
        # multiplied with tokens first and turned then: much faster than the other order where d_out is large
        small = (grad @ columns).t().contiguous()
        du, dgate, z = masked_blend_backward(small[: heads * rank], u, gate, ctx.sizes, ctx.dropout)
        # the same holds here for heads first
        dB = _turned(z @ grad, ctx.dtype) if ctx.needs_input_grad[4] else None
        return dy, du, small[heads * rank :] if ctx.needs_input_grad[2] else None, dgate, dB, None, None, None, None


def _columns(B: Tensor, B0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B | B0] in the compute dtype."""
    return (B if B0 is None else torch.cat((B, B0), 1)).to(dtype)


def _turned(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of a matrix in another dtype, in memory of its own: autograd would copy it otherwise."""
    rows, columns = matrix.shape
    return matrix.new_empty(columns, rows, dtype=dtype).copy_(matrix.t())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """``F.linear`` into a (T, d_out) that is there."""
    if bias is None:
        return torch.mm(by_token(x), weight.t(), out=out)
    return torch.addmm(bias, by_token(x), weight.t(), out=out)
