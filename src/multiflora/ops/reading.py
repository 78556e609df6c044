r"""What reads x: stems, router and offset in one product, and dropout on what the stems read.

.. math::
    [u \mid \ell \mid u^0] = x\,[s A_1; \dots; s A_K;\; R;\; -s A^0]^\top

With dropout the stems read what is left of x, router and offset x as it is: two products. What is left never leaves a
processor's caches (docs/decisions/0019). Letters are those of :mod:`multiflora.ops.packed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from multiflora.ops import native
from multiflora.ops.mask import Dropout, kept_by_block, survivor_weight

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""

_BLOCK = 512
"""Bytes down a column of x that a processor drops at a time, 128 tokens in float32: a block stays in its caches."""


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
        y, an empty (..., d_out) for :func:`multiflora.ops.heads` to fill, or None without weight; u = s A x (K r, T);
        the router's logits (H, T) or None; u0 = -s A0 x (r, T) or None.
    """
    if torch.compiler.is_compiling():
        # the compiler replays its own dropout in the backward pass and could not trace a seed that becomes a number
        x = by_token(x)
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


def by_token(x: Tensor) -> Tensor:
    """(..., d) to (T, d)."""
    return x.reshape(-1, x.shape[-1])


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
    tensor of x's size. y is only the place for it: the product is computed where y is written
    (:mod:`multiflora.ops.writing`), after the small steps. A large product empties the caches, and each small step that
    comes after one takes several times as long.
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
        tokens = by_token(x)
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
        x = by_token(saved)
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
                dx = by_token(dy) @ weight
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
