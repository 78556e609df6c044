r"""M-LoRA: R-LoRA without its router, the heads averaged or summed (Align-LoRA, Liu et al. 2025, arXiv 2508.05078).

.. math::
    y = W x + s\,c \sum_{h=1}^{N} B_h \,(m_h \odot A x) - s\,\bar B^0 A^0 x,
    \qquad c = \tfrac1N \text{ (mean) or } 1 \text{ (sum)}

The offset is the same sum at the start, :math:`\bar B^0 = c \sum_h B_h^0`. Without a router the update is one matrix:
it merges exactly, into rank r. (The paper sums heads in its section 3.1 and averages them in 3.3.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from multiflora.methods.base import Method
from multiflora.methods.config import one_of
from multiflora.methods.gates import FixedGate
from multiflora.methods.method_card import MethodCard
from multiflora.methods.rlora import RandomHeadsConfig, has_offset, start

CARD = MethodCard(
    name="mlora",
    title="M-LoRA",
    line="R-LoRA without its router: random heads averaged or summed.",
    paper="arXiv 2508.05078",
    settings=("num_heads", "head_dropout", "gamma", "reduce"),
    merges="exactly",
    experts="with target_parameters",
    config="MLoraConfig",
)


@dataclass
class MLoraConfig(RandomHeadsConfig):
    """M-LoRA (arXiv 2508.05078): R-LoRA without the router.

    Example:
        >>> MLoraConfig(num_heads=4, reduce="sum", target_modules="all-linear").reduce
        'sum'
    """

    method_name: ClassVar[str] = "mlora"

    reduce: str = field(default="mean", metadata={"help": "How heads are put together: 'mean' or 'sum'."})

    def problems(self) -> list[str]:
        """See the base class."""
        found = [*super().problems(), *one_of(self, "reduce", ("mean", "sum"))]
        if self.init_weights == "zero" and self.head_dropout == 0 and max(self.head_counts()) > 1:
            found.append(
                "init_weights='zero' with head_dropout=0 keeps all heads identical for ever; use init_weights='paper' "
                "or head_dropout above 0."
            )
        return found


METHOD = Method(
    name="mlora",
    config=MLoraConfig,
    heads=lambda config: config.num_heads,
    gate=FixedGate(value=lambda config: 1 / config.num_heads if config.reduce == "mean" else 1.0),
    start=start,
    offset=has_offset,
    head_dropout=lambda config: config.head_dropout,
)
