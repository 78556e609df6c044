"""The floor: what the packed branches have to compute and move, and how fast this machine does that.

Two floors are told apart. The *roofline* divides FLOPs and bytes by the rates of one large product and one large copy.
The *practical* floor runs the same six skinny products on ready buffers: no machine multiplies (T, 40) matrices at the
rate of square ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiflora.bench.timing import Phases, stopwatch

__all__ = ["Products", "copy_rate", "gemm_rate", "modules_products", "products", "run_products"]


class Products(NamedTuple):
    """The packed op's work on one layer of T tokens."""

    tokens: int
    d_in: int
    d_out: int
    stem_rows: int
    """Rows that read x: stems, router, offset."""
    trained_rows: int
    """Those with a gradient: without the offset."""
    columns: int
    """Columns that write y: heads and offset."""
    trained_columns: int

    def shapes(self) -> list[tuple[int, int, int]]:
        """(m, k, n) of the six products: two forward, four backward."""
        T, d_in, d_out = self.tokens, self.d_in, self.d_out
        return [
            (self.stem_rows, d_in, T),
            (T, self.columns, d_out),
            (T, d_out, self.columns),
            (self.trained_columns, T, d_out),
            (T, self.stem_rows, d_in),
            (self.trained_rows, T, d_in),
        ]

    def flops(self) -> float:
        """Operations of the six products."""
        return float(sum(2 * m * k * n for m, k, n in self.shapes()))

    def bytes(self, item: int) -> float:
        """Bytes that must pass the memory, at ``item`` bytes a number.

        Only the large tensors count: x read twice (u, dA), y read and written, dy read twice (dz, dB), dx read and
        written.
        """
        return float(item * self.tokens * (4 * self.d_in + 4 * self.d_out))


def products(tokens: int, d_in: int, d_out: int, heads: int, rank: int) -> Products:
    """R-LoRA's: one stem, a router row a head, an offset of the stem's rank.

    Example:
        >>> products(1, 4096, 11008, heads=5, rank=8)
        Products(tokens=1, d_in=4096, d_out=11008, stem_rows=21, trained_rows=13, columns=48, trained_columns=40)
    """
    return Products(tokens, d_in, d_out, 2 * rank + heads, rank + heads, (heads + 1) * rank, heads * rank)


def modules_products(tokens: int, d_in: int, d_out: int, modules: int, rank: int) -> Products:
    """MultiLoRA's: a stem and a head for each module, and nothing besides.

    Example:
        >>> modules_products(1, 4096, 11008, modules=3, rank=8)
        Products(tokens=1, d_in=4096, d_out=11008, stem_rows=24, trained_rows=24, columns=24, trained_columns=24)
    """
    return Products(tokens, d_in, d_out, *[modules * rank] * 4)


def run_products(work: Products, dtype: torch.dtype, device: torch.device) -> Callable[[], Phases]:
    """The six products alone, in the order and orientation of :mod:`multiflora.ops.packed`, on ready buffers."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    x, y = torch.randn(work.tokens, work.d_in, **options), torch.randn(work.tokens, work.d_out, **options)
    rows, columns = torch.randn(work.stem_rows, work.d_in, **options), torch.randn(work.d_out, work.columns, **options)
    u, z = torch.randn(work.stem_rows, work.tokens, **options), torch.randn(work.columns, work.tokens, **options)
    dx, dy = torch.zeros_like(x), torch.randn_like(y)

    def run() -> Phases:
        lap = stopwatch(device)
        rows @ x.t()
        # beta keeps the accumulators from growing over the rounds at the same cost
        y.addmm_(z.t(), columns.t(), beta=0.5, alpha=0.5)
        forward = lap()
        dy @ columns
        z[: work.trained_columns] @ dy
        dx.addmm_(u.t(), rows, beta=0.5, alpha=0.5)
        u[: work.trained_rows] @ x
        return {"forward": forward, "backward": lap()}

    return run


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """FLOP a second of a large square product, the best of five."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the best of five."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], Tensor], device: torch.device) -> float:
    work()
    lap, seconds = stopwatch(device), []
    for _ in range(5):
        work()
        seconds.append(min(lap().values()))
    return min(seconds)
