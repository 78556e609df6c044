r"""The same sum, one head at a time: the oracle of the tests and the opponent of the benchmark.

.. math:: y = W x + s \sum_h g_h\, B_h (m_h \odot A_{\sigma(h)} x) - s\,\bar B^0 A^0 x
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from multiflora.ops.mask import head_mask


def loop(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    gate: Tensor | None,
    B: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    *,
    num_heads: int,
    rank: int,
    scale: float,
    dropout: tuple[float, int] = (0.0, 0),
    hidden: Tensor | None = None,
) -> Tensor:
    """Add every head's update to y with a product of its own, as the published code does; autograd does the rest.

    Arguments are those of :func:`multiflora.ops.heads`, with the stems' input x, (T, d_in), in place of u, and
    ``hidden``: what all heads read where something stands between them and the stems, (T, r), or None for A x. Given
    the same seed, masks are the packed op's.
    """
    p, seed = dropout
    mask = None
    if p > 0:
        mask = head_mask(x.shape[0], num_heads, rank, p, seed, device=x.device, dtype=x.dtype)
    own_stems = A.shape[0] > rank
    for h in range(num_heads):
        stem = A[h * rank : (h + 1) * rank] if own_stems else A
        read = F.linear(x, stem.to(x.dtype)) if hidden is None else hidden
        if mask is not None:
            read = read * mask[h].t()
        update = F.linear(read, B[:, h * rank : (h + 1) * rank].to(x.dtype)) * scale
        if gate is not None:
            update = update * gate[:, h : h + 1].to(update.dtype)
        y = y + update.to(y.dtype)
    if A0 is not None and B0 is not None:
        y = y - (F.linear(F.linear(x, A0.to(x.dtype)), B0.to(x.dtype)) * scale).to(y.dtype)
    return y
