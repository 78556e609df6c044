r"""R-LoRA: one shared A, N random heads B, a router, dropout per head (Liu et al. 2025, arXiv 2502.15455).

.. math::
    y = W x + s \sum_{h=1}^{N} \omega_h(x)\, B_h \,(m_h \odot A x) \; - \; s\,\bar B^0 A^0 x,
    \qquad \omega(x) = \operatorname{softmax}(R x), \quad \bar B^0 = \tfrac1N \sum_h B_h^0

The paper subtracts the random start from the base weight, W' = W - s B̄⁰A⁰. Here W is never written to: the same term
is a frozen low-rank offset saved with the adapter, so quantised bases, several adapters and ``disable_adapter`` work
and the adapter loads on the pristine base. With the router at zero the first step *is* the base model.

Starts (``init_weights``), with c = d_out^¼ / √γ and N(0, v) of variance v:

- "paper": A ~ c N(0, 1/d_in), B_h ~ c N(0, 1/d_out) (v1, Table 1).
- "code": what the published code runs. It takes r for d_out in c and multiplies inside the head loop, so A ends at c^N
  and head h at c^(N-h): heads differ by up to 10^3 in size. For parity runs only.
- "zero": heads at zero, as HydraLoRA; the router must then be random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from multiflora.methods.base import Method
from multiflora.methods.block_router import block_group, shared_router
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import TokenRouter
from multiflora.methods.initial import head_views, kaiming_uniform, normal, random_heads, stem_and_zero_heads
from multiflora.methods.method_card import MethodCard
from multiflora.methods.router import ROUTER_LOSS, RouterConfig

CARD = MethodCard(
    name="rlora",
    title="R-LoRA",
    line="One shared A, random heads B, a token router and dropout per head: heads learn different tasks.",
    paper="arXiv 2502.15455",
    settings=(
        "num_heads",
        "head_dropout",
        "gamma",
        "router_init",
        "top_k",
        "router_balance_loss",
        "router_z_loss",
        "router_per",
    ),
    merges="no (token router)",
    experts="with target_parameters",
    config="RLoraConfig",
)


@dataclass
class RandomHeadsConfig(AdapterConfig):
    """What R-LoRA and its router-free form M-LoRA share."""

    heads_setting: ClassVar[str] = "num_heads"

    r: int = field(default=4, metadata={"help": "Rank of the shared A and of each head."})
    lora_alpha: float = field(default=32, metadata={"help": "alpha; the update is scaled by alpha/r."})
    num_heads: Union[int, list[int]] = field(  # noqa: UP007
        default=3, metadata={"help": "How many heads B (N)."}
    )
    head_dropout: float = field(
        default=0.2, metadata={"help": "Dropout on A x, drawn for each head by itself, in [0, 1)."}
    )
    gamma: float = field(
        default=64.0, metadata={"help": "Divides the variance of the random start; larger is smaller."}
    )

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "init_weights", (True, False, "paper", "code", "zero")),
        ]


@dataclass
class RLoraConfig(RandomHeadsConfig, RouterConfig):
    """R-LoRA (arXiv 2502.15455): shared A, ``num_heads`` random heads, a router on the token, dropout per head.

    Defaults: r and alpha of the published script, 3 heads and dropout 0.2 of the second version, gamma 64.

    Example:
        >>> config = RLoraConfig(num_heads=5, head_dropout=0.1, target_modules=["up_proj", "down_proj"])
        >>> RLoraConfig(num_heads=0)
        Traceback (most recent call last):
        ...
        multiflora.errors.ConfigError: RLoraConfig: num_heads is 0; it must be a whole number of at least 1, and \
at most 10,000.
    """

    method_name: ClassVar[str] = "rlora"

    router_init: str = field(
        default="zero",
        metadata={"help": "'zero': all heads weigh the same at first, step 0 is the base; 'kaiming': as the code."},
    )

    def problems(self) -> list[str]:
        """See the base class."""
        found = [*super().problems(), *one_of(self, "router_init", ("zero", "kaiming"))]
        equal = self.init_weights == "zero" and self.router_init == "zero" and self.head_dropout == 0
        if equal and max(self.head_counts()) > 1:
            found.append(
                "init_weights='zero' with router_init='zero' and head_dropout=0 keeps all heads identical for ever; "
                "use router_init='kaiming', random heads (init_weights='paper') or head_dropout above 0."
            )
        if self.top_k is not None and (has_offset(self) or self.router_init == "zero"):
            found.append(
                "top_k leaves heads out from the first step, so the mean of all heads would not take the random start "
                "off; and a router at zero prefers none. Set init_weights='zero' and router_init='kaiming' with it."
            )
        return found


def start(config: RandomHeadsConfig, A: Tensor, B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """Fill the shared A, (r, d_in), and the heads B, (d_out, N r), as ``init_weights`` says."""
    rank, d_in = A.shape
    d_out = B.shape[0]
    if config.init_weights is False:
        kaiming_uniform(A, generator)
        random_heads(B, heads, generator)
    elif config.init_weights == "zero":
        stem_and_zero_heads(config, A, B, heads, generator)
    elif config.init_weights == "code":
        nested = rank**0.25 / math.sqrt(config.gamma)
        normal(A, nested**heads / math.sqrt(max(rank, d_in)), generator)
        for h, head in enumerate(head_views(B, heads)):
            normal(head, nested ** (heads - h) / math.sqrt(max(rank, d_out)), generator)
    else:
        size = d_out**0.25 / math.sqrt(config.gamma)
        normal(A, size / math.sqrt(d_in), generator)
        normal(B, size / math.sqrt(d_out), generator)


def has_offset(config: Any) -> bool:
    """Whether the start is random, so that its mean has to be taken off."""
    return config.init_weights not in (False, "zero")


METHOD = Method(
    name="rlora",
    config=RLoraConfig,
    heads=lambda config: config.num_heads,
    gate=TokenRouter(zero=lambda config: config.router_init == "zero"),
    start=start,
    shared=shared_router,
    group=block_group,
    offset=has_offset,
    head_dropout=lambda config: config.head_dropout,
    loss=ROUTER_LOSS,
)
