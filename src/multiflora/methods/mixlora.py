r"""MixLoRA's routing: E whole LoRA experts, of which the best k serve a token (Li et al. 2024, arXiv 2404.15159).

.. math::
    y = W x + s \sum_{e \in \text{top-}k} \omega_e(x)\, B_e A_e x, \qquad
    \omega(x) = \operatorname{softmax}\left(\text{top-}k\,(R x)\right)

with the load-balance loss :math:`b\,E \sum_e F_e P_e`, without which few experts would be chosen and few would learn.
The weight b = 0.001 and the router's start, :math:`R \sim \mathcal N(0, 0.02^2)`, are the published code's.

In the paper one router serves a whole feed-forward block, and attention carries plain LoRAs: that is
``router_per="block"`` with ``heads_pattern={"self_attn.*": 1}``, see :mod:`multiflora.methods.block_router`. By default
every adapted layer has a router of its own, as in all methods of this library. The code draws a dropout mask on x for
each expert; here one mask serves all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Optional, Union

from multiflora.methods.base import Method
from multiflora.methods.block_router import block_group, shared_router
from multiflora.methods.config import one_of
from multiflora.methods.gates import TokenRouter
from multiflora.methods.hydralora import start
from multiflora.methods.method_card import MethodCard
from multiflora.methods.router import ROUTER_LOSS, RouterConfig

CARD = MethodCard(
    name="mixlora",
    title="MixLoRA's routing",
    line="Whole LoRA experts of which a token router picks the best k, with a load-balance loss.",
    paper="arXiv 2404.15159",
    settings=("num_experts", "top_k", "router_balance_loss", "router_z_loss", "router_per"),
    merges="no (token router)",
    experts="with target_parameters",
    config="MixLoraConfig",
)

ROUTER_STD = 0.02
"""Standard deviation of the router's start."""


@dataclass
class MixLoraConfig(RouterConfig):
    """MixLoRA's routing (arXiv 2404.15159): ``num_experts`` LoRAs, the best ``top_k`` for each token.

    Defaults: 8 experts, the best 2, balance loss of weight 0.001, dropout 0.05.

    Example:
        >>> MixLoraConfig(num_experts=4, target_modules=["gate_proj", "up_proj", "down_proj"]).top_k
        2
        >>> MixLoraConfig(num_experts=4, top_k=5)
        Traceback (most recent call last):
        ...
        multiflora.errors.ConfigError: MixLoraConfig: top_k is 5; it must be a whole number from 2 to one less than \
num_experts (4). With 1, the chosen head's weight would always be 1 and the router would learn nothing; with all, \
leave it out.
    """

    method_name: ClassVar[str] = "mixlora"
    heads_setting: ClassVar[str] = "num_experts"

    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the stems, in [0, 1)."})
    num_experts: Union[int, list[int]] = field(  # noqa: UP007
        default=8, metadata={"help": "How many experts (E)."}
    )
    top_k: Optional[int] = field(default=2, metadata={"help": "How many experts serve a token."})  # noqa: UP045
    router_balance_loss: float = field(default=0.001, metadata={"help": "Weight of the load-balance loss."})

    def problems(self) -> list[str]:
        """See the base class."""
        return [*super().problems(), *one_of(self, "init_weights", (True, False))]


METHOD = Method(
    name="mixlora",
    config=MixLoraConfig,
    heads=lambda config: config.num_experts,
    shared_stem=False,
    gate=TokenRouter(std=lambda config: ROUTER_STD),
    start=start,
    shared=shared_router,
    group=block_group,
    loss=ROUTER_LOSS,
)
