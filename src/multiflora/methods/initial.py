"""How matrices start: in-place fillers that take a generator (None: the global one). Meta tensors are left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming_uniform(weight: Tensor, generator: torch.Generator | None = None) -> None:
    r"""What ``nn.Linear`` starts from: :math:`U(\pm 1/\sqrt{\text{fan in}})`, fan in being the last axis."""
    uniform(weight, 1 / math.sqrt(weight.shape[-1]), generator)


def uniform(weight: Tensor, bound: float, generator: torch.Generator | None = None) -> None:
    """Uniform on [-bound, bound]."""
    if not weight.is_meta:
        with torch.no_grad():
            weight.uniform_(-bound, bound, generator=generator)


def normal(weight: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Normal with mean 0 and the given standard deviation."""
    if not weight.is_meta:
        with torch.no_grad():
            weight.normal_(0.0, std, generator=generator)


def sparse(weight: Tensor, number: int, std: float, generator: torch.Generator | None = None) -> None:
    """Normal in ``number`` places of each row, drawn for each row, and 0 elsewhere: FlyLoRA's projection."""
    if not weight.is_meta:
        with torch.no_grad():
            places = torch.rand(weight.shape, generator=generator, device=weight.device).topk(max(number, 1), 1).indices
            weight.normal_(0.0, std, generator=generator)
            weight.mul_(torch.zeros_like(weight).scatter(1, places, 1.0))


def head_views(B: Tensor, heads: int) -> tuple[Tensor, ...]:
    """The heads of a packed B, (d_out, H r), as H views of shape (d_out, r)."""
    return tuple(B.view(B.shape[0], heads, -1).unbind(1))


def stem_and_zero_heads(config: object, A: Tensor, B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """LoRA's own start, for every branch: Kaiming-uniform stems, heads at zero."""
    kaiming_uniform(A, generator)
    if not B.is_meta:
        torch.nn.init.zeros_(B)


def random_heads(B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """Kaiming-uniform heads, each as an ``nn.Linear`` of fan in r (not H r)."""
    uniform(B, math.sqrt(heads / B.shape[1]), generator)
