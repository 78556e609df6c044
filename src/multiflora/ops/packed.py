r"""Packed branches: two small matrix products per layer, however many heads.

.. math::
    [u \mid \ell \mid u^0] &= x\,[s A_1; \dots; s A_K;\; R;\; -s A^0]^\top \\
    z_h &= g_h \; m_h \odot u_{\sigma(h)} \\
    y &\mathrel{+}= [z_1 \dots z_H \mid u^0]\,[B_1 \dots B_H \mid \bar B^0]^\top

One product for stems, router and offset; an elementwise step on H r numbers a token; one product added into the base
output. The scale s sits in the stems' rows, where it costs nothing per token. The backward pass keeps x (the layer's
own input), u, the gate and the seed of the masks, from which z is made again.

Letters: T tokens, K stems, H heads, r rank of a branch, d_in and d_out the layer's widths. Large tensors have tokens
first, in as many axes as the layer's input has: (..., d_in) with T rows in all. The small ones (u, logits, gate, mask,
z) have tokens last, in one axis: H and r are too short to fill a vector register, T is not. Weights may be float32
masters: they are cast to x's dtype inside, so the large tensors never change dtype.

Each line of the equation has a file: :mod:`~multiflora.ops.reading` what reads x, :mod:`~multiflora.ops.elementwise`
the step between, :mod:`~multiflora.ops.writing` what writes y. :func:`multiflora.ops.stems` and
:func:`multiflora.ops.heads` leave room for a gate of any kind between them; :func:`branches` is both with a plain
router, or nothing, in between. On a processor :mod:`multiflora.ops.native` runs these same functions compiled; on a GPU
:mod:`multiflora.ops.triton_kernels` does the elementwise step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multiflora.ops import native
from multiflora.ops.mask import Dropout
from multiflora.ops.reading import stems
from multiflora.ops.writing import Base, heads


def softmax(logits: Tensor) -> Tensor:
    """A token router's gate, (H, T), of its logits, (H, T): over the heads, in float32 at least."""
    return torch.softmax(logits, 0, dtype=torch.promote_types(logits.dtype, torch.float32))


def branches(
    x: Tensor,
    A: Tensor,
    router: Tensor | None,
    A0: Tensor | None,
    B: Tensor,
    B0: Tensor | None,
    y: Tensor | None,
    base: Base | None,
    *,
    num_heads: int,
    rank: int,
    scale: float = 1.0,
    stem_dropout: Dropout = (0.0, 0),
    head_dropout: Dropout = (0.0, 0),
) -> tuple[Tensor, Tensor | None]:
    """The whole layer: :func:`stems` and :func:`heads`, and between them the softmax of the router, if there is one.

    Most methods need no more, and compiled it is one call and one node of autograd.

    Args:
        x: Layer input, (..., d_in).
        A: Stems one under another, (K r, d_in).
        router: Router rows, (H, d_in), or None: all heads weigh 1.
        A0: Frozen stem of the offset, (r, d_in), or None.
        B: Heads side by side, (d_out, H r).
        B0: Frozen mean head of the offset, (d_out, r), or None.
        y: Output of the base layer, (..., d_out), or None with ``base``.
        base: x, weight and bias of a frozen base layer whose output is to be computed along, or None.
        num_heads: H.
        rank: r.
        scale: s.
        stem_dropout: Probability and seed of the mask on what the stems read.
        head_dropout: Probability and seed of the mask on each head's input.

    Returns:
        (..., d_out), in y's dtype; with ``base`` in x's. And the gate, (H, T), to look at: it has no gradient. None
        without a router.

    Example:
        >>> x, A, B = torch.ones(1, 3), torch.ones(1, 3), torch.ones(4, 2)
        >>> branches(x, A, None, None, B, None, torch.zeros(1, 4), None, num_heads=2, rank=1)
        (tensor([[6., 6., 6., 6.]]), None)
    """
    compiled = None if torch.compiler.is_compiling() else native.serve(x)
    if compiled is not None:
        _, weight, bias = base or (None, None, None)
        sizes = (num_heads, rank)
        out: tuple[Tensor, Tensor | None] = compiled.branches(
            x, A, router, A0, B, B0, y, weight, bias, *sizes, scale, *stem_dropout, *head_dropout
        )
        return out
    weight = None if base is None else base[1]
    place, u, logits, u0 = stems(x, A, router, A0, weight, scale=scale, dropout=stem_dropout)
    gate = None if logits is None else softmax(logits)
    y = place if y is None else y
    assert y is not None
    summed = heads(y, u, u0, gate, B, B0, base, num_heads=num_heads, rank=rank, dropout=head_dropout)
    return summed, None if gate is None else gate.detach()
