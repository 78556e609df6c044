r"""Every row of a batch sampled by its own rules: temperature, top-p and seed of its own request.

With Gumbel noise :math:`G_i`, :math:`\arg\max_i(\ell_i/T + G_i)` is a draw from :math:`\operatorname{softmax}(\ell/T)`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Rule", "keep_top", "perturbed"]


class Rule(Protocol):
    """How a row is sampled."""

    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    generator: torch.Generator


def keep_top(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities reach p; the others become -inf.

    Args:
        logits: (vocabulary,), already divided by the temperature.
        p: In (0, 1].

    Example:
        >>> keep_top(torch.tensor([0.6, 0.3, 0.1]).log(), 0.7).exp()
        tensor([0.6000, 0.3000, 0.0000])
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before >= p), -torch.inf)


def perturbed(logits: Tensor, rule: Rule) -> Tensor:
    """Logits whose largest entry is the row's next token."""
    if rule.temperature == 0:
        return logits
    kept = keep_top(logits.float().cpu() / rule.temperature, rule.top_p)
    noise = torch.empty_like(kept).exponential_(generator=rule.generator)
    return (kept - noise.log()).to(logits.device)
