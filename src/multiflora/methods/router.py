r"""What all methods with a token router share: how many heads serve a token, and what the router adds to the loss.

.. math:: L = b\, N \sum_h F_h P_h + z\, \operatorname{mean}_x \left(\log \sum_h e^{\ell_h(x)}\right)^2

The first term belongs to sparse routing (``top_k``), where heads that are never chosen would never learn; see
``losses.load_balance`` and ``losses.router_z``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from torch import Tensor

from multiflora.methods.base import Loss, LossInputs
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.losses import load_balance, router_z

__all__ = ["ROUTER_LOSS", "RouterConfig", "router_loss", "sparse_routing_problems"]


@dataclass
class RouterConfig(AdapterConfig):
    """The settings of a token router."""

    heads_setting: ClassVar[str] = "num_heads"

    top_k: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "How many heads serve a token; all of them when not given."}
    )
    router_balance_loss: float = field(
        default=0.0, metadata={"help": "Weight of the load-balance loss; for sparse routing (top_k)."}
    )
    router_z_loss: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    router_per: str = field(
        default="layer",
        metadata={"help": "A router for each 'layer', or one for a feed-forward 'block', on what enters it."},
    )

    def problems(self) -> list[str]:
        """See the base class."""
        found = [*super().problems(), *one_of(self, "router_per", ("layer", "block"))]
        if self.router_per == "block" and self.target_parameters:
            found.append(
                "router_per='block' does not go with target_parameters: the experts of a mixture have its router "
                "before them. Leave one of the two out."
            )
        return found or sparse_routing_problems(self)

    def with_heads(self, heads: int) -> dict[str, Any]:
        """See the base class. All of a layer's heads serve each token where there are no more than ``top_k``."""
        own = super().with_heads(heads)
        if self.top_k is not None and heads <= self.top_k:
            own |= {"top_k": None, "router_balance_loss": 0.0}
        return own


def sparse_routing_problems(config: RouterConfig) -> list[str]:
    """What cannot work in ``top_k`` and its loss."""
    k, heads, setting = config.top_k, max(config.head_counts()), config.heads_setting
    if k is None:
        if config.router_balance_loss:
            return ["router_balance_loss balances which heads are chosen, and without top_k all are: set top_k."]
        return []
    if not 2 <= k < heads:
        return [
            f"top_k is {k!r}; it must be a whole number from 2 to one less than {setting} ({heads!r}). With 1, "
            "the chosen head's weight would always be 1 and the router would learn nothing; with all, leave it out."
        ]
    return []


def router_loss(config: Any, inputs: LossInputs) -> Tensor | None:
    """The load-balance loss and the z-loss with their weights, or None when both are off."""
    balance, z = config.router_balance_loss, config.router_z_loss
    if not (balance or z) or inputs.gate is None or inputs.logits is None:
        return None
    logits, gate = inputs.logits.t(), inputs.gate.t()
    keep = inputs.tokens.keep()
    terms: list[Tensor] = []
    if balance:
        terms.append(balance * load_balance(logits, gate, keep))
    if z:
        terms.append(z * router_z(logits, keep))
    return sum(terms[1:], terms[0])


ROUTER_LOSS = Loss(router_loss, ("router_balance_loss", "router_z_loss"))
