"""What routers add to the loss. Pure functions; the layer collects their values, ``auxiliary_loss`` sums them."""

from __future__ import annotations

import torch
from torch import Tensor


def per_row(gate: Tensor, rows: int, keep: Tensor | None) -> Tensor:
    """Mean gate of each row's real tokens: (T, H) with T = rows · length, and keep (T,) in {0, 1}, give (rows, H)."""
    by_row = gate.reshape(rows, -1, gate.shape[-1])
    if keep is None:
        return by_row.mean(1)
    weight = keep.reshape(rows, -1, 1).to(gate.dtype)
    return (by_row * weight).sum(1) / weight.sum(1).clamp(min=1)


def squared_variation(values: Tensor) -> Tensor:
    r""":math:`\mathrm{CV}^2 = \operatorname{var}/\operatorname{mean}^2` over all entries; 0 for fewer than two."""
    flat = values.flatten()
    if flat.numel() < 2:
        return flat.sum() * 0
    return flat.var() / (flat.mean().square() + 1e-10)


def localized_balance(load: Tensor, knowledge: Tensor, delta: float) -> Tensor:
    r"""LoRAMoE's localized balancing loss, :math:`\mathrm{CV}^2(Q \odot I)` (arXiv 2312.09979, section 3.3).

    Experts of the first half are meant for world-knowledge rows, those of the second half for all others. I is
    :math:`1+\delta` where expert and row belong together and :math:`1-\delta` where not, so a balanced Z = Q ⊙ I makes
    the matching experts' load Q the *smaller* by the ratio (1-δ)/(1+δ) as printed in the paper.

    Args:
        load: Q, mean gate of each row, (rows, E).
        knowledge: Whether a row is of the world-knowledge kind, (rows,).
        delta: δ in [0, 1).
    """
    experts = load.shape[1]
    first_half = torch.arange(experts, device=load.device) < experts // 2
    together = first_half.unsqueeze(0) == knowledge.to(torch.bool).unsqueeze(1)
    importance = torch.where(together, 1 + delta, 1 - delta).to(load.dtype)
    return squared_variation(load * importance)


def router_z(logits: Tensor, keep: Tensor | None) -> Tensor:
    r"""Keeps router logits small: mean over tokens of :math:`(\log\sum_h e^{\ell_h})^2` (arXiv 2202.08906, eq. 5)."""
    squared = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).square()
    if keep is None:
        return squared.mean()
    weight = keep.to(squared.dtype)
    return (squared * weight).sum() / weight.sum().clamp(min=1)
