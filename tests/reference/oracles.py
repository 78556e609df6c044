"""Each method as its paper prints it: one token at a time, one head at a time, nothing clever.

A reader should be able to check each function against the equation by eye. ``p`` holds the layer's tensors, ``x`` is
one token (d_in,), ``t`` its task, ``s`` the scaling, ``mask[h]`` the dropout mask of head h (ones without dropout) and
``xd`` the token after input dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def head(p: dict[str, Tensor], h: int, r: int) -> Tensor:
    """B_h, (d_out, r)."""
    return p["B"][:, h * r : (h + 1) * r]


def stem(p: dict[str, Tensor], h: int, r: int) -> Tensor:
    """A_h, (r, d_in)."""
    return p["A"][h * r : (h + 1) * r]


def routed(logits: Tensor, k: int | None) -> Tensor:
    """The softmax over the k largest logits of one token, 0 for the others."""
    order = sorted(range(len(logits)), key=lambda h: -float(logits[h]))
    chosen = order[: len(order) if k is None else k]
    total = sum(torch.exp(logits[h]) for h in chosen)
    return torch.stack([torch.exp(logits[h]) / total if h in chosen else 0 * logits[h] for h in range(len(logits))])


def multilora(p, x, xd, t, s, r, mask, config):
    """s · Σ_i g_i ⊙ (B_i A_i x)."""
    total = 0
    for i in range(config.num_modules):
        total = total + p["scale"][i] * (head(p, i, r) @ (stem(p, i, r) @ xd))
    return (s if config.use_alpha else 1.0) * total


def rlora(p, x, xd, t, s, r, mask, config):
    """s · [ Σ_h softmax(R x)_h B_h (m_h ⊙ A x) − B̄⁰ A⁰ x ]."""
    weights = routed(p["router"] @ x, config.top_k)
    total = 0
    for h in range(config.num_heads):
        total = total + weights[h] * (head(p, h, r) @ (mask[h] * (p["A"] @ xd)))
    if "A0" in p:
        total = total - p["B0"] @ (p["A0"] @ x)
    return s * total


def mlora(p, x, xd, t, s, r, mask, config):
    """s · [ c Σ_h B_h (m_h ⊙ A x) − B̄⁰ A⁰ x ], c = 1/N or 1."""
    c = 1 / config.num_heads if config.reduce == "mean" else 1.0
    total = 0
    for h in range(config.num_heads):
        total = total + c * (head(p, h, r) @ (mask[h] * (p["A"] @ xd)))
    if "A0" in p:
        total = total - p["B0"] @ (p["A0"] @ x)
    return s * total


def hydralora(p, x, xd, t, s, r, mask, config):
    """s · Σ_h softmax(R x)_h B_h A x."""
    weights = routed(p["router"] @ x, config.top_k)
    total = 0
    for h in range(config.num_heads):
        total = total + weights[h] * (head(p, h, r) @ (p["A"] @ xd))
    return s * total


def moelora(p, x, xd, t, s, r, mask, config):
    """s · Σ_e softmax(W_T e_t)_e B_e A_e x, s = α/r with the r of all experts together."""
    weights = torch.softmax(p["task_router"] @ p["task_embedding"][t], 0)
    total = 0
    for e in range(config.num_experts):
        total = total + weights[e] * (head(p, e, r) @ (stem(p, e, r) @ xd))
    return s * total


def loramoe(p, x, xd, t, s, r, mask, config):
    """s · Σ_e softmax(R x)_e B_e A_e x."""
    weights = routed(p["router"] @ x, config.top_k)
    total = 0
    for e in range(config.num_experts):
        total = total + weights[e] * (head(p, e, r) @ (stem(p, e, r) @ xd))
    return s * total


def mixlora(p, x, xd, t, s, r, mask, config):
    """s · Σ_{e in top-k} softmax(top-k R x)_e B_e A_e x."""
    return loramoe(p, x, xd, t, s, r, mask, config)


def alignlora(p, x, xd, t, s, r, mask, config):
    """s · B A x."""
    return s * (p["B"] @ (p["A"] @ xd))


def loraga(p, x, xd, t, s, r, mask, config):
    """s · [ B A x − B⁰ A⁰ x ]."""
    return s * (p["B"] @ (p["A"] @ xd) - p["B0"] @ (p["A0"] @ x))


def deltalora(p, x, xd, t, s, r, mask, config):
    """(W_t − W_0) x + s · B A x, where W_t − W_0 = λ s (B A − B_K A_K) has no gradient."""
    moved = p["B"].detach() @ p["A"].detach()
    if "A0" in p:
        moved = moved - p["B0"] @ p["A0"]
    return config.update_ratio * s * (moved @ x) + s * (p["B"] @ (p["A"] @ xd))


def scored(logits: Tensor, k: int | None) -> Tensor:
    """σ(l_h) of the k largest logits of one token over their sum, 0 for the others."""
    order = sorted(range(len(logits)), key=lambda h: -float(logits[h]))
    chosen = order[: len(order) if k is None else k]
    total = sum(torch.sigmoid(logits[h]) for h in chosen)
    return torch.stack([torch.sigmoid(logits[h]) / total if h in chosen else 0 * logits[h] for h in range(len(logits))])


def largest(read: list[Tensor], k: int) -> list[float]:
    """1 for the k longest of the vectors that heads read, 0 for the others."""
    order = sorted(range(len(read)), key=lambda h: -float(read[h].detach().norm()))
    return [1.0 if h in order[:k] else 0.0 for h in range(len(read))]


def parts(p, x, xd, t, s, r, mask, config):
    """s · [ Σ_h g_h B_h (m_h ⊙ M A_σ(h) x) − B̄⁰ A⁰ x ], each part as the config says."""
    if config.stem == "blended":
        weights = torch.softmax(p["router"] @ x, 0)
        mixture = sum(weights[i] * (stem(p, i, r) @ xd) for i in range(config.num_stems))
    read = []
    for h in range(config.num_heads):
        if config.stem == "blended":
            hidden = mixture
        else:
            hidden = (stem(p, h, r) if config.stem == "own" else p["A"]) @ xd
        if config.core != "none":
            weights = torch.softmax(p["core_router"] @ hidden, 0)
            cores = [core if config.core == "full" else torch.diag(core) for core in p["core"]]
            hidden = sum(weights[i] * core for i, core in enumerate(cores)) @ hidden
        if config.task_matrix != "none":
            matrix = p["task_matrix"][t]
            hidden = (matrix if config.task_matrix == "full" else torch.diag(matrix)) @ hidden
        read.append(hidden)
    blend = scored if config.router_scores == "sigmoid" else routed
    total = 0
    for h in range(config.num_heads):
        update = head(p, h, r) @ (mask[h] * read[h])
        if config.gate == "mean":
            update = update / config.num_heads
        elif config.gate == "scale":
            update = update * p["scale"][h]
        elif config.gate == "token":
            update = update * blend(p["router"] @ x, config.top_k)[h]
        elif config.gate == "stem":
            update = update * blend(p["stem_router"] @ read[0], config.top_k)[h]
        elif config.gate == "largest":
            update = update * largest(read, config.top_k)[h]
        elif config.gate == "task":
            update = update * torch.softmax(p["task_logits"][t] / config.temperature, 0)[h]
        elif config.gate == "task_embedding":
            update = update * torch.softmax(p["task_router"] @ p["task_embedding"][t], 0)[h]
        total = total + update
    if "A0" in p:
        total = total - p["B0"] @ (p["A0"] @ x)
    return s * total


def mtllora(p, x, xd, t, s, r, mask, config):
    """s · Σ_h softmax(w_t / τ)_h B_h Λ_t A x."""
    weights = torch.softmax(p["task_logits"][t] / config.temperature, 0)
    matrix = p["task_matrix"][t]
    hidden = (matrix if matrix.dim() == 2 else torch.diag(matrix)) @ (p["A"] @ xd)
    total = 0
    for h in range(config.num_heads):
        total = total + weights[h] * (head(p, h, r) @ hidden)
    return s * total


def cosine(one, other):
    return (one * other).sum() / ((one.norm() + 1e-6) * (other.norm() + 1e-6))


def alike(matrices):
    """D²MoRA's published loop over all pairs: Σ_{i<j} |cos(M_i, M_j)|."""
    total = torch.zeros((), dtype=matrices[0].dtype)
    for i in range(len(matrices)):
        for j in range(i + 1, len(matrices)):
            total = total + cosine(matrices[i], matrices[j]).abs()
    return total
