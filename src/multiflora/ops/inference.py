r"""The sum without gradients: what a prepared adapter adds to its layer, with tokens first.

.. math::
    [u \mid \ell \mid u^0] = x\,S^\top, \qquad z_h = g_h\, u_{\sigma(h)}, \qquad y = W x + [z_1 \dots z_H \mid u^0]\,C

It is the equation of :mod:`multiflora.ops.packed`, with everything that does not depend on the token done before: the
stems, router and offset are stacked, scaled and cast into S, the heads and the mean head into C. A processor does the
two small products of a few tokens in loops of its own (``inference.h``): a call of a library takes longer than their
numbers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multiflora.ops import native
from multiflora.ops.experts import WIDTH, grouped
from multiflora.ops.writing import Base

__all__ = ["Prepared", "digest", "infer", "infer_experts"]


class Prepared(NamedTuple):
    """One layer's branches as they are multiplied: two matrices, in the dtype of the layer's input.

    Those of a mixture's experts have an axis of E experts before their own.
    """

    rows: Tensor
    """S = [s A_1; ...; s A_K; R; -s A⁰], (K r + H' + k, d_in), with H' = H rows of a router, or 0 without one."""
    columns: Tensor
    """C = [B_1 | ... | B_H | B̄⁰]^T, (H r + k, d_out)."""
    num_heads: int
    """H."""
    rank: int
    """r of each head."""
    routed: bool
    """Whether the gate is the softmax of the logits that S makes."""
    top_k: int
    """Of the softmax: how many logits of a token take part; 0 for all."""


def infer(
    x: Tensor, prepared: Prepared, base: Base | None = None, *, y: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """Compute a layer's output with its branches, without gradients.

    Args:
        x: Layer input, (..., d_in), in the dtype of the prepared matrices.
        prepared: The branches.
        base: x, weight and bias of the base layer, where its output is to be computed along.
        y: Output of the base layer, (..., d_out), where there is no ``base``; it is not written to.
        gate: Weight of each head for each token, (T, H), where neither a router of the layer makes it nor all weigh 1.

    Returns:
        (..., d_out) in the dtype of y, or of x with ``base``.

    Example:
        >>> prepared = Prepared(torch.ones(1, 3), torch.ones(2, 4), 2, 1, routed=False, top_k=0)
        >>> infer(torch.ones(1, 3), prepared, y=torch.zeros(1, 4))
        tensor([[6., 6., 6., 6.]])
    """
    rows, columns, num_heads, rank, routed, top_k = prepared
    compiled = None if torch.compiler.is_compiling() else native.serve(x)
    if compiled is not None:
        _, weight, bias = base or (None, None, None)
        out: Tensor = compiled.infer(x, rows, columns, y, weight, bias, gate, num_heads, rank, routed, top_k)
        return out
    z = _blended(F.linear(x.reshape(-1, x.shape[-1]), rows), prepared, gate)
    if base is not None:
        y = F.linear(*base)
    assert y is not None
    added = torch.mm(z, columns).view(*x.shape[:-1], -1)
    return y + added.to(y.dtype)


def infer_experts(x: Tensor, prepared: Prepared, y: Tensor, ends: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """Add the branches of a mixture's experts to their products, without gradients.

    Args:
        x: Tokens by expert, (S, d_in), in the dtype of the prepared matrices.
        prepared: The branches of all experts: rows (E, ., d_in) and columns (E, ., d_out).
        y: The experts' products, (S, d_out), in x's dtype; it may be written to.
        ends: Where each expert's tokens end, (E,), int32.
        gate: Weight of each head for each token, (S, H), see :func:`infer`.

    Returns:
        (S, d_out).

    Example:
        >>> prepared = Prepared(torch.ones(2, 1, 3), torch.ones(2, 2, 4), 2, 1, routed=False, top_k=0)
        >>> infer_experts(torch.ones(1, 3), prepared, torch.zeros(1, 4), torch.tensor([0, 1], dtype=torch.int32))
        tensor([[6., 6., 6., 6.]])
    """
    compiled = None if torch.compiler.is_compiling() else native.serve(x)
    if compiled is not None:
        y = y.contiguous()
        compiled.infer_experts(y, x, prepared.rows, prepared.columns, ends, gate, *prepared[2:])
        return y
    z, columns = _blended(grouped(x, prepared.rows, ends), prepared, gate), prepared.columns
    fill = (0, -z.shape[1] % WIDTH)
    return y + grouped(F.pad(z, fill), F.pad(columns.mT, fill), ends)


def _blended(read: Tensor, prepared: Prepared, gate: Tensor | None) -> Tensor:
    """What heads and mean head multiply, (T, H r + k), of what each token read, (T, .)."""
    rows, columns, num_heads, rank, routed, top_k = prepared
    offset = columns.shape[-2] - num_heads * rank
    sizes = [rows.shape[-2] - offset - num_heads * routed, num_heads * routed, offset]
    stems, logits, frozen = torch.split_with_sizes(read, sizes, 1)
    if routed:
        gate = top_softmax(logits, top_k)
    z = stems
    if gate is not None:
        by_head = stems.unflatten(1, (-1, rank))  # type: ignore[no-untyped-call]  # (T, 1 or H, r)
        z = (by_head * gate.to(read.dtype).unsqueeze(-1)).flatten(1)
    elif stems.shape[1] < num_heads * rank:
        z = stems.repeat(1, num_heads)
    return torch.cat((z, frozen), 1)


def top_softmax(logits: Tensor, top_k: int) -> Tensor:
    """Softmax over the last axis, in float32 at least; with ``top_k`` > 0 of the largest k alone, 0 elsewhere.

    Example:
        >>> top_softmax(torch.tensor([[0.0, 1.0, 1.0]]), 2)
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    if top_k:
        left_out = torch.ones_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, -1).indices, False)
        logits = logits.masked_fill(left_out, -torch.inf)
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def digest(tensors: Sequence[Tensor]) -> int | None:
    """A number of 64 bits that changes with any bit of the tensors; None where it would not be quick to make.

    It takes about as long as to read them, so that weights can be compared before every forward pass.

    Args:
        tensors: On a processor and contiguous, or there is no number.

    Example:
        >>> digest([torch.ones(2, device="meta")]) is None
        True
    """
    compiled = native.serve(tensors[0])
    if compiled is None or not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return None
    number: int = compiled.digest([tensor.detach() for tensor in tensors])
    return number
