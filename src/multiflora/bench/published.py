r"""The published loop: the arithmetic of the released R-LoRA code, written anew, as the opponent of the benchmark.

.. math:: y = W' x + s \sum_h \omega_h(x)\, B_h(\operatorname{drop}(A x)), \qquad \omega = \operatorname{softmax}(R x)

As there: A x is computed again for every head, each head has two products of its own, and each head's T×d_out output is
weighted by a column of ω, so autograd keeps it. The offset is not in the sum: that code writes it into W' at the start.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["PublishedLoop"]


class PublishedLoop(nn.Module):
    """A frozen layer with heads added one by one.

    Args:
        base: The frozen layer.
        heads: How many heads N.
        rank: r of A and of every head.
        scale: s.
        dropout: Probability of the mask on each head's input, drawn for every head.
    """

    def __init__(self, base: nn.Linear, heads: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        options: dict[str, Any] = {"bias": False, "device": base.weight.device}
        self.router = nn.Linear(base.in_features, heads, **options)
        self.A = nn.Linear(base.in_features, rank, **options)
        self.B = nn.ModuleList(nn.Linear(rank, base.out_features, **options) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x, any leading axes."""
        y: Tensor = self.base(x)
        gate = torch.softmax(self.router(x), -1, dtype=torch.float32).to(y.dtype)
        for h, head in enumerate(self.B):
            y = y + gate[..., h : h + 1] * head(self.dropout(self.A(x))) * self.scale
        return y

    @torch.no_grad()
    def load_packed(self, A: Tensor, B: Tensor, router: Tensor) -> None:
        """Take the weights of a packed layer: A (r, d_in), B (d_out, N r), router (N, d_in)."""
        self.A.weight.copy_(A)
        self.router.weight.copy_(router)
        for head, columns in zip(self.B, B.chunk(len(self.B), 1), strict=True):
            cast(nn.Linear, head).weight.copy_(columns)
