r"""How alike the heads of a layer are, and how large. Pure functions.

R-LoRA (arXiv 2502.15455) and Align-LoRA (arXiv 2508.05078) draw the mean pairwise cosine of a layer's heads
:math:`B_h`, each flattened to one vector. A cosine hides sizes, so norms stand beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["head_cosine", "head_norms", "head_points"]


def head_cosine(heads: Tensor) -> float | None:
    r"""Mean cosine over all pairs of heads; None for a single head, and for heads that are all zero.

    .. math:: \frac{2}{H(H-1)} \sum_{g<h} \frac{\langle B_g, B_h\rangle}{\|B_g\|_F \|B_h\|_F}

    Args:
        heads: (H, d_out, r).

    Example:
        >>> head_cosine(torch.stack((torch.ones(2, 1), -torch.ones(2, 1))))
        -1.0
    """
    flat = F.normalize(heads.flatten(1).to(torch.float64), dim=1, eps=0.0) if heads.any() else None
    if len(heads) < 2 or flat is None:
        return None
    flat = flat.nan_to_num()  # a zero head has no direction: it is counted as orthogonal to all
    above = torch.triu(torch.ones(len(heads), len(heads), dtype=torch.bool), diagonal=1)
    return float((flat @ flat.t())[above].mean())


def head_norms(heads: Tensor) -> list[float]:
    """The Frobenius norm of each head, (H, d_out, r)."""
    return [float(norm) for norm in heads.flatten(1).to(torch.float64).norm(dim=1)]


def head_points(heads: list[Tensor], seed: int = 42) -> npt.NDArray[np.float64] | None:
    """Lay heads out in the plane by t-SNE: alike heads lie close, distances between groups mean nothing.

    Args:
        heads: Tensors of one shape, one for each head of each layer.
        seed: Of the layout; as in HydraLoRA's figure, it starts from the first two principal components.

    Returns:
        (len(heads), 2), or None for fewer than five heads, of which no layout says anything.
    """
    if len(heads) < 5:
        return None
    from sklearn.manifold import TSNE

    points = torch.stack([head.flatten() for head in heads]).to(torch.float32).numpy()
    if not np.ptp(points, axis=0).any():
        return None
    perplexity = min(30.0, (len(points) - 1) / 3)
    layout: Any = TSNE(n_components=2, init="pca", random_state=seed, perplexity=perplexity).fit_transform(points)
    return np.asarray(layout, dtype=np.float64)
