r"""What methods add to the loss: pure functions on one layer's tensors.

.. math:: L = L_{\text{task}} + \sum_{\text{adapters}} \operatorname{mean}_{\text{layers}} \ell

One rule for all of them: the mean over the layers that carry the adapter, so that a weight means the same in a small
and in a large model. So it is in Align-LoRA's script, and in transformers' ``load_balancing_loss_func``, which the code
of MixLoRA takes over: one value for the model, however many layers there are. (The Switch paper, arXiv 2101.03961, adds
layers up, with a weight chosen for its number of them.) `multiflora.context` adds it to the model's own loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_row(gate: Tensor, rows: int, keep: Tensor | None, of: Tensor | None = None) -> Tensor:
    """Mean gate of each row's real tokens, (rows, H); 0 for a row that has none.

    Args:
        gate: (T, H).
        rows: How many rows there are.
        keep: 1 for real tokens and 0 for padding, (T,), or None.
        of: The row of each token, (T,); None: all rows are equally long, and come one after another.
    """
    if of is None:
        of = torch.arange(rows, device=gate.device).repeat_interleave(len(gate) // rows)
    weight = torch.ones_like(gate[:, :1]) if keep is None else keep.to(gate.device, gate.dtype).unsqueeze(1)
    sums = gate.new_zeros(rows, gate.shape[1]).index_add(0, of, gate * weight)
    tokens = gate.new_zeros(rows, 1).index_add(0, of, weight)
    return sums / tokens.clamp(min=1)


def squared_variation(values: Tensor, there: Tensor | None = None) -> Tensor:
    r""":math:`\mathrm{CV}^2 = \operatorname{var}/\operatorname{mean}^2` over all entries; 0 for fewer than two.

    Args:
        values: Any shape.
        there: 1 for entries that count and 0 for others, of the same shape; None: all count.
    """
    flat = values.flatten()
    weight = torch.ones_like(flat) if there is None else there.flatten().to(flat.dtype)
    number = weight.sum()
    mean = (flat * weight).sum() / number.clamp(min=1)
    variance = ((flat - mean).square() * weight).sum() / (number - 1).clamp(min=1)
    return variance / (mean.square() + 1e-10)


def localized_balance(load: Tensor, knowledge: Tensor, delta: float, there: Tensor | None = None) -> Tensor:
    r"""LoRAMoE's localized balancing loss, :math:`\mathrm{CV}^2(Q \odot I)` (arXiv 2312.09979, section 3.3).

    Experts of the first half are meant for world-knowledge rows, those of the second half for all others. I is
    :math:`1+\delta` where expert and row belong together and :math:`1-\delta` where not, so a balanced Z = Q ⊙ I makes
    the matching experts' load Q the *smaller* by the ratio (1-δ)/(1+δ) as printed in the paper.

    Args:
        load: Q, mean gate of each row, (rows, E).
        knowledge: Whether a row is of the world-knowledge kind, (rows,).
        delta: δ in [0, 1).
        there: 1 for rows that hold text and 0 for those that only fill the batch, (rows,); None: all do.
    """
    experts = load.shape[1]
    first_half = torch.arange(experts, device=load.device) < experts // 2
    together = first_half.unsqueeze(0) == knowledge.to(torch.bool).unsqueeze(1)
    importance = torch.where(together, 1 + delta, 1 - delta).to(load.dtype)
    return squared_variation(load * importance, None if there is None else there.unsqueeze(1).expand_as(load))


def router_z(logits: Tensor, keep: Tensor | None) -> Tensor:
    r"""Keeps router logits small: mean over tokens of :math:`(\log\sum_h e^{\ell_h})^2` (arXiv 2202.08906, eq. 5)."""
    squared = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).square()
    if keep is None:
        return squared.mean()
    weight = keep.to(squared.dtype)
    return (squared * weight).sum() / weight.sum().clamp(min=1)


def entropy(logits: Tensor, keep: Tensor | None) -> Tensor:
    r"""How undecided a router is: mean over tokens of :math:`-\sum_h p_h \log p_h`, p being the softmax of its logits.

    Args:
        logits: The router's, (T, H).
        keep: 1 for real tokens and 0 for padding, (T,), or None.
    """
    logs = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    each: Tensor = -(logs.exp() * logs).sum(-1)
    if keep is None:
        return each.mean()
    weight = keep.to(each.dtype)
    return (each * weight).sum() / weight.sum().clamp(min=1)


def overlap(matrices: Tensor) -> Tensor:
    r"""D²MoRA's orthogonality of experts: :math:`\sum_{i<j} |\cos(M_i, M_j)|`, each matrix taken for one long vector.

    It is 0 where all are orthogonal to each other. The paper regularises the down-projections and the up-projections
    alike; this is its published code (``compute_loss_with_orthogonal``), with its 1e-6 below the fraction.

    Args:
        matrices: (n, ...).
    """
    flat = matrices.flatten(1).to(torch.promote_types(matrices.dtype, torch.float32))
    unit = flat / (torch.linalg.vector_norm(flat, dim=1, keepdim=True) + 1e-6)
    total: Tensor = (unit @ unit.t()).triu(1).abs().sum()
    return total


def load_balance(logits: Tensor, gate: Tensor, keep: Tensor | None) -> Tensor:
    r"""The load-balance loss of sparse routers, :math:`N \sum_h F_h P_h` (arXiv 2101.03961, eq. 4-6; MixLoRA's eq. 5).

    F is each head's share of the choices (k for each token) and P the mean of the *dense* softmax, through which alone
    the gradient flows. It is 1 where all heads are chosen equally often, and more where they are not. For k above 1
    the shares count all k choices; MixLoRA prints the first alone, its code counts all.

    Args:
        logits: The router's, (T, H).
        gate: Weight of each head, 0 where it was not chosen, (T, H).
        keep: 1 for real tokens and 0 for padding, (T,), or None.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    chosen = (gate > 0).to(wide)
    shares, probabilities = chosen / chosen.sum(1, keepdim=True), torch.softmax(logits, 1, dtype=wide)
    if keep is None:
        F, P = shares.mean(0), probabilities.mean(0)
    else:
        weight = keep.to(wide).unsqueeze(1)
        tokens = weight.sum().clamp(min=1)
        F, P = (shares * weight).sum(0) / tokens, (probabilities * weight).sum(0) / tokens
    return logits.shape[1] * (F * P).sum()


def alignment(stems: Tensor, tasks: Tensor, num_tasks: int, keep: Tensor | None) -> Tensor:
    r"""Align-LoRA's loss on one layer: the mean symmetric KL divergence between tasks (arXiv 2508.05078).

    Each task's A x in the batch is taken for a Gaussian with independent coordinates,
    :math:`\mathcal N(\mu_t, \operatorname{diag} v_t)`. In the symmetric divergence the logarithms cancel:

    .. math::
        \tfrac12\left(D_{ij} + D_{ji}\right) = \tfrac14 \sum_d \left[ \frac{v_i}{v_j} + \frac{v_j}{v_i} - 2
        + (\mu_i - \mu_j)^2 \left(\frac1{v_i} + \frac1{v_j}\right) \right]_d

    It does not change when A x is scaled. Tasks with fewer than two tokens in the batch take no part; with fewer than
    two tasks the loss is 0.

    Args:
        stems: A x of each token, (T, r).
        tasks: Task of each token, (T,).
        num_tasks: How many tasks there are.
        keep: 1 for real tokens and 0 for padding, (T,), or None.
    """
    x = stems.to(torch.promote_types(stems.dtype, torch.float32))
    member = torch.nn.functional.one_hot(tasks, num_tasks).to(x.dtype)
    if keep is not None:
        member = member * keep.to(x.dtype).unsqueeze(1)
    count = member.sum(0).unsqueeze(1)
    mean = member.t() @ x / count.clamp(min=1)
    # 1e-8: what the published code adds, against a coordinate that a task never moves
    variance = member.t() @ (x - mean[tasks]).square() / (count - 1).clamp(min=1) + 1e-8
    i, j = torch.triu_indices(num_tasks, num_tasks, 1, device=x.device)
    ratio = variance[i] / variance[j]
    apart = (mean[i] - mean[j]).square() * (1 / variance[i] + 1 / variance[j])
    divergence = (ratio + 1 / ratio - 2 + apart).sum(1) / 4
    there = (count > 1).squeeze(1)
    pairs = (there[i] & there[j]).to(x.dtype)
    return (divergence * pairs).sum() / pairs.sum().clamp(min=1)
