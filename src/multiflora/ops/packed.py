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

:func:`stems` and :func:`heads` leave room for a gate of any kind between them; :func:`branches` is both with a plain
router, or nothing, in between. On a processor :mod:`multiflora.ops.native` runs these same functions compiled; on a GPU
:mod:`multiflora.ops.triton_kernels` does the elementwise step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from multiflora.ops import native, triton_kernels
from multiflora.ops.mask import dropped_levels, head_mask, kept_by_block, survivor_weight

Dropout = tuple[float, int]
"""Probability and seed of a mask."""
Base = tuple[Tensor, Tensor, "Tensor | None"]
"""A frozen layer's input, weight and bias."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""

_BLOCK = 512
"""Bytes down a column of x that a processor drops at a time, 128 tokens in float32: a block stays in its caches."""


def pack(*parts: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    """Concatenate what is there along ``dim`` and cast the (small) result to the compute dtype."""
    present = [part for part in parts if part is not None]
    joined = present[0] if len(present) == 1 else torch.cat(present, dim)
    return joined.to(dtype)


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


def _added(rows: Sequence[Tensor]) -> Tensor:
    """Their sum in float32 at least, one after another: torch's order depends on the machine and the place of a row."""
    total = torch.zeros_like(rows[0], dtype=torch.promote_types(rows[0].dtype, torch.float32))
    for row in rows:
        total += row
    return total


def _flat(z: Tensor, heads: int) -> Tensor:
    """(H or 1, r, T) to (H r, T); a single one stands for all heads."""
    return (z if len(z) == heads else z.expand(heads, -1, -1)).reshape(heads * z.shape[1], z.shape[2])


class _Reading(NamedTuple):
    """Rows that read one input: x, or what dropout leaves of it."""

    parts: tuple[Tensor | None, Tensor | None, Tensor | None]
    """A, router and A0, or None in place of those that read the other input."""
    scale: float
    of_dropped: bool = False

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, tuple[int, ...]]:
        """[s A; R; -s A0] in x's dtype, and how many rows each of the three has."""
        present = [part for part in self.parts if part is not None]
        widths = tuple(0 if part is None else part.shape[0] for part in self.parts)
        # weights in half precision are scaled before they are rounded
        wide = torch.promote_types(present[0].dtype, torch.float32)
        return (torch.cat(present) * _factors(widths, self.scale, wide, present[0].device)).to(dtype), widths


@cache
def _factors(widths: tuple[int, ...], scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each row of the packed stems is multiplied with: s for A, 1 for the router, -s for the offset."""
    values = [scale] * widths[0] + [1.0] * widths[1] + [-scale] * widths[2]
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def _readings(A: Tensor, router: Tensor | None, A0: Tensor | None, scale: float, dropout: Dropout) -> list[_Reading]:
    """One reading; with dropout one of router and offset, and the stems' of what is left of x."""
    p, _ = dropout
    if p == 0:
        return [_Reading((A, router, A0), scale)]
    # the survivors' weight goes into the rows, too
    of_dropped = _Reading((A, None, None), scale * survivor_weight(p), of_dropped=True)
    if router is None and A0 is None:
        return [of_dropped]
    return [_Reading((None, router, A0), scale), of_dropped]


def _blocks(x: Tensor, dropout: Dropout) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and the mask on their x as integers: all bits set where it is kept, none where it is dropped.

    Bits are applied in half the time of numbers, and a NaN can be dropped by them.
    """
    size, start = x.element_size(), 0
    for block in kept_by_block(tuple(x.shape), *dropout, _BLOCK // size, device=x.device, dtype=_INTEGERS[size]):
        yield slice(start, start + len(block)), block.neg_()
        start += len(block)


def _left(x: Tensor, bits: Tensor, *, out: Tensor | None = None) -> Tensor:
    """What dropout leaves of x, without the survivors' weight, in memory of its own or in that of ``out``."""
    left = torch.bitwise_and(x.view(bits.dtype), bits, out=None if out is None else out.view(bits.dtype))
    return left.view(x.dtype)


def _read_dropped(x: Tensor, rows: Tensor, dropout: Dropout) -> Tensor:
    """The product of rows with what dropout leaves of x, (R, T)."""
    read = x.new_empty(len(rows), len(x))
    for tokens, bits in _blocks(x, dropout):
        # the mask has been applied and gives its memory
        torch.mm(rows, _left(x[tokens], bits, out=bits).t(), out=read[:, tokens])
    return read


def _read_dropped_backward(
    dread: Tensor, dx: Tensor | None, x: Tensor, rows: Tensor, dropout: Dropout, *, needs_x: bool, needs_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`_read_dropped`: that of x added to ``dx``, and that of rows, in float32 at least."""
    sums = dx is not None
    if needs_x and dx is None:
        dx = torch.empty_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    drows = x.new_zeros(rows.shape, dtype=wide) if needs_rows else None
    for tokens, bits in _blocks(x, dropout):
        if drows is not None:
            if wide == x.dtype:
                drows.addmm_(dread[:, tokens], _left(x[tokens], bits))
            else:
                drows += dread[:, tokens] @ _left(x[tokens], bits)
        if dx is not None:
            part = dread[:, tokens].t() @ rows
            if sums:
                dx[tokens] += _left(part, bits, out=part)
            else:
                _left(part, bits, out=dx[tokens])
    return dx, drows


class _Stems(torch.autograd.Function):
    """``x -> (y, u, logits, u0)``: all that reads x, and the base product too when its frozen weight is given.

    Taking the base product in lets its input gradient and the stems' be accumulated by one call, without a second
    tensor of x's size. y is only the place for it: :class:`_Heads` computes the product, after the small steps. A large
    product empties the caches, and each small step that comes after one takes several times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        A: Tensor,
        router: Tensor | None,
        A0: Tensor | None,
        scale: float,
        dropout: Dropout,
    ) -> tuple[Tensor | None, ...]:
        # not the packed rows: of all layers together they would outweigh what is kept for the tokens
        ctx.save_for_backward(x, weight, A, router, A0)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.dropout = scale, dropout
        y = None if weight is None else x.new_empty(*x.shape[:-1], weight.shape[0])
        read: list[Tensor | None] = [None] * 3
        tokens = _by_token(x)
        for reading in _readings(A, router, A0, scale, dropout):
            rows, widths = reading.rows(x.dtype)
            product = _read_dropped(tokens, rows, dropout) if reading.of_dropped else rows @ tokens.t()
            split = torch.split_with_sizes(product, widths)
            read = [part if width else other for part, width, other in zip(split, widths, read, strict=True)]
        return y, *read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dread: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, weight, A, router, A0 = ctx.saved_tensors
        x = _by_token(saved)
        needs_x, _, needs_A, needs_router, *_ = ctx.needs_input_grad
        dA = drouter = dx = None
        for reading in _readings(A, router, A0, ctx.scale, ctx.dropout):
            rows, widths = reading.rows(x.dtype)
            there = [
                x.new_zeros(width, x.shape[0]) if grad is None else grad
                for grad, width in zip(dread, widths, strict=True)
                if width
            ]
            together = there[0] if len(there) == 1 else torch.cat(there)
            to_A, to_router = needs_A and widths[0] > 0, needs_router and widths[1] > 0
            grads = None
            if (to_A or to_router) and not reading.of_dropped:
                # the offset is not trained
                grads = together[: widths[0] + widths[1]] @ x
            if needs_x and dx is None and weight is not None and dy is not None:
                dx = _by_token(dy) @ weight
            if reading.of_dropped:
                dx, grads = _read_dropped_backward(together, dx, x, rows, ctx.dropout, needs_x=needs_x, needs_rows=to_A)
            elif needs_x:
                dx = together.t() @ rows if dx is None else dx.addmm_(together.t(), rows)
            if grads is not None and to_A:
                dA = grads[: widths[0]].to(A.dtype).mul_(reading.scale)
            if grads is not None and to_router:
                drouter = grads[widths[0] :].to(router.dtype)
        if dx is not None:
            dx = dx.view(saved.shape)
        return dx, None, dA, drouter, None, None, None


class _Heads(torch.autograd.Function):
    """``(y, u, gate, ...) -> y + z B^T``, keeping u, the gate and the masks' seed.

    With ``base``, the layer's x, weight and bias, y is a place to compute ``W x`` in first; its gradient goes to
    :class:`_Stems`, which made the place.
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
        z, columns = _blend(u, gate, sizes, dropout), pack(B, B0, dim=1, dtype=u.dtype)
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
            return torch.addmm(_by_token(y), z.t(), columns.t()).view(y.shape)
        return y + (z.t() @ columns.t()).to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        u, gate, B, B0 = ctx.saved_tensors
        heads, rank = ctx.sizes
        grad, columns = _by_token(dy).to(u.dtype), pack(B, B0, dim=1, dtype=u.dtype)
        # multiplied with tokens first and turned then: much faster than the other order where d_out is large
        small = (grad @ columns).t().contiguous()
        du, dgate, z = _blend_backward(small[: heads * rank], u, gate, ctx.sizes, ctx.dropout)
        # the same holds here for heads first
        dB = _turned(z @ grad, ctx.dtype) if ctx.needs_input_grad[4] else None
        return dy, du, small[heads * rank :] if ctx.needs_input_grad[2] else None, dgate, dB, None, None, None, None


def _by_token(x: Tensor) -> Tensor:
    """(..., d) to (T, d)."""
    return x.reshape(-1, x.shape[-1])


def _turned(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of a matrix in another dtype, in memory of its own: autograd would copy it otherwise."""
    rows, columns = matrix.shape
    return matrix.new_empty(columns, rows, dtype=dtype).copy_(matrix.t())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """``F.linear`` into a (T, d_out) that is there."""
    if bias is None:
        return torch.mm(_by_token(x), weight.t(), out=out)
    return torch.addmm(bias, _by_token(x), weight.t(), out=out)


def _blend(u: Tensor, gate: Tensor | None, sizes: tuple[int, int], dropout: Dropout) -> Tensor:
    """:func:`blend` under the mask of this seed, by a kernel where there is one."""
    heads, rank = sizes
    if triton_kernels.serve(u.device):
        dropped, seed = dropped_levels(dropout[0]), dropout[1]
        return triton_kernels.blend(u, gate, heads=heads, rank=rank, dropped=dropped, seed=seed)
    return blend(u, gate, _heads_mask(u, sizes, dropout), heads=heads, rank=rank)


def _blend_backward(
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


def stems(
    x: Tensor,
    A: Tensor,
    router: Tensor | None,
    A0: Tensor | None,
    weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: Dropout = (0.0, 0),
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Everything that reads x, in one product: ``(y, u, logits, u0)``.

    Args:
        x: Layer input, (..., d_in).
        A: Stems one under another, (K r, d_in).
        router: Router rows, (H, d_in), or None.
        A0: Frozen stem of the offset, (r, d_in), or None.
        weight: Frozen weight of the base layer, (d_out, d_in), where its output's gradient is to be taken along.
        scale: s.
        dropout: Probability and seed of the mask on what the stems read; router and offset read x as it is.

    Returns:
        y, an empty (..., d_out) for :func:`heads` to fill, or None without weight; u = s A x (K r, T); the router's
        logits (H, T) or None; u0 = -s A0 x (r, T) or None.
    """
    if torch.compiler.is_compiling():
        # the compiler replays its own dropout in the backward pass and could not trace a seed that becomes a number
        x = _by_token(x)
        dropped = F.dropout(x, dropout[0]) if dropout[0] > 0 else x
        logits = None if router is None else router.to(x.dtype) @ x.t()
        u0 = None if A0 is None else (A0 * -scale).to(x.dtype) @ x.t()
        return None, (A * scale).to(x.dtype) @ dropped.t(), logits, u0
    out: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]
    compiled = native.serve(x)
    if compiled is not None:
        out = compiled.stems(x, weight, A, router, A0, scale, *dropout)
        return out
    out = _Stems.apply(x, weight, A, router, A0, scale, dropout)  # type: ignore[no-untyped-call]
    return out


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
        y: Output of the base layer, (..., d_out); with ``base``, the place for it that :func:`stems` made.
        u: From :func:`stems`, (K r, T).
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
        return y + (z.t() @ pack(B, B0, dim=1, dtype=z.dtype).t()).to(y.dtype).view(y.shape)
    compiled = native.serve(y)
    if compiled is not None:
        summed: Tensor = compiled.heads(y, u, u0, gate, B, B0, *(base or (None, None, None)), *sizes, *dropout)
        return summed
    out: Tensor = _Heads.apply(y, u, u0, gate, B, B0, sizes, dropout, base)  # type: ignore[no-untyped-call]
    return out


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
