r"""Delta-LoRA: the weight moves along with the change of B A (Zi et al. 2023, arXiv 2309.02411, eq. 5 and 6).

.. math::
    W_{t+1} = W_t + \lambda\, s\,(B_{t+1}A_{t+1} - B_t A_t) \quad (t \ge K), \qquad y = W_t x + s\, B_t A_t x

W has no gradient and no optimiser state: it follows. The steps add up to one difference,

.. math:: W_t = W_0 + \lambda\, s\,(B_t A_t - B_K A_K)

so here W₀ is never written to. The move is a frozen low-rank term made of the trained factors themselves, cut off from
the gradient (the gradient of A and B flows through s B A alone, as in the paper; that of x through all of W_t), and of
:math:`A_K, B_K`, which are saved with the adapter where ``start_step`` is not 0. So it works on quantised bases, beside
other adapters, and merges exactly, into rank 2r.

``start_step`` K counts the optimiser's steps of an adapter's first training during which W stays, and in a later one
W goes on from where it is; the paper's algorithm moves for the first time in
step K + 2 of its K. With K > 0 a training loop of your own needs `multiflora.training_callbacks`; without them W moves
from the first step on. The paper trains without dropout, as the default here does: with it, W would follow a product
that the forward pass has not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from multiflora.methods.base import Method, Parts
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import Gate
from multiflora.methods.hydralora import start
from multiflora.methods.method_card import MethodCard

CARD = MethodCard(
    name="deltalora",
    title="Delta-LoRA",
    line="LoRA whose change the weight follows, kept as low-rank factors.",
    paper="arXiv 2309.02411",
    settings=("update_ratio", "start_step"),
    merges="exactly",
    config="DeltaLoraConfig",
)


@dataclass
class DeltaLoraConfig(AdapterConfig):
    """Delta-LoRA (arXiv 2309.02411): LoRA whose change the weight follows, ``update_ratio`` times.

    Example:
        >>> DeltaLoraConfig(target_modules=["q_proj", "v_proj"]).update_ratio
        2.0
    """

    method_name: ClassVar[str] = "deltalora"

    update_ratio: float = field(default=2.0, metadata={"help": "How many times the change of s B A the weight moves."})
    start_step: int = field(default=0, metadata={"help": "Steps during which the weight stays (K)."})

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "init_weights", (True, False)),
        ]


def moving(config: DeltaLoraConfig, parts: Parts) -> tuple[Tensor, Tensor]:
    """The move as a frozen term -s B⁰A⁰: B⁰A⁰ = -λ (B A - B_K A_K), without gradient."""
    A, B = parts["A"].detach(), parts["B"].detach() * -config.update_ratio
    if "A0" not in parts:
        return A, B
    return torch.cat((A, parts["A0"])), torch.cat((B, parts["B0"] * config.update_ratio), 1)


def after_step(config: DeltaLoraConfig, layers: Iterable[Parts], step: int) -> None:
    """While the weight stays, A_K and B_K are what A and B have become."""
    if step <= config.start_step:
        with torch.no_grad():
            for parts in layers:
                if "A0" in parts:
                    parts["A0"].copy_(parts["A"])
                    parts["B0"].copy_(parts["B"])


def stays_at_first(config: Any) -> bool:
    """Whether A_K and B_K have to be kept; with K = 0, B_K is 0."""
    return bool(config.start_step)


METHOD = Method(
    name="deltalora",
    config=DeltaLoraConfig,
    heads=lambda config: 1,
    gate=Gate(),
    start=start,
    offset=stays_at_first,
    moving=moving,
    after_step=after_step,
)
