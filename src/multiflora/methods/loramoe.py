r"""LoRAMoE: E whole LoRA experts behind a dense router on the token (Dou et al. 2023, arXiv 2312.09979).

.. math:: y = W x + s \sum_{e=1}^{E} \omega_e(x)\, B_e A_e x, \qquad \omega(x) = \operatorname{softmax}(R x)

The localized balance loss asks the first half of the experts to serve rows of world knowledge and the second half all
others: :math:`\mathrm{CV}^2(Q \odot I)`, see ``losses.localized_balance``. It needs the row's task and
``knowledge_tasks``. The published script leaves it off, as the default here does. The code draws a dropout mask on x
for each expert; here one mask serves all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Optional, Union

import torch
from torch import Tensor

from multiflora.methods.base import Loss, LossInputs, Method
from multiflora.methods.block_router import block_group, shared_router
from multiflora.methods.config import one_of
from multiflora.methods.gates import TokenRouter
from multiflora.methods.hydralora import start
from multiflora.methods.losses import localized_balance, per_row
from multiflora.methods.method_card import MethodCard
from multiflora.methods.router import ROUTER_LOSS, RouterConfig, router_loss
from multiflora.task_ids import missing

CARD = MethodCard(
    name="loramoe",
    title="LoRAMoE",
    line="Whole LoRA experts behind a dense token router, with a localized balance loss.",
    paper="arXiv 2312.09979",
    settings=(
        "num_experts",
        "balance_weight",
        "balance_delta",
        "knowledge_tasks",
        "top_k",
        "router_balance_loss",
        "router_z_loss",
        "router_per",
    ),
    merges="no (token router)",
    experts="with target_parameters",
    config="LoraMoeConfig",
)


@dataclass
class LoraMoeConfig(RouterConfig):
    """LoRAMoE (arXiv 2312.09979): ``num_experts`` LoRAs behind a dense router.

    Defaults: the published script's (r 4, alpha 32, dropout 0.05, 8 experts, balance off).

    Example:
        >>> config = LoraMoeConfig(
        ...     balance_weight=0.1, balance_delta=0.1, task_names=["mmlu", "gsm8k"], knowledge_tasks=["mmlu"],
        ...     target_modules=["gate_proj", "up_proj", "down_proj"],
        ... )
    """

    method_name: ClassVar[str] = "loramoe"
    heads_setting: ClassVar[str] = "num_experts"

    r: int = field(default=4, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=32, metadata={"help": "alpha; the update is scaled by alpha/r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the stems, in [0, 1)."})
    num_experts: Union[int, list[int]] = field(  # noqa: UP007
        default=8, metadata={"help": "How many experts (E)."}
    )
    balance_weight: float = field(default=0.0, metadata={"help": "Weight of the localized balance loss (blc_weight)."})
    balance_delta: float = field(
        default=0.0, metadata={"help": "Its δ in [0, 1) (blc_alpha): how far the halves may differ."}
    )
    knowledge_tasks: Optional[list[str]] = field(  # noqa: UP045
        default=None,
        metadata={"help": "Names of the tasks of world knowledge; needed by the balance loss with δ > 0."},
    )

    def problems(self) -> list[str]:
        """See the base class."""
        found = [
            *super().problems(),
            *one_of(self, "init_weights", (True, False)),
        ]
        unknown = sorted(set(self.knowledge_tasks or ()) - set(self.task_names or ()))
        if unknown:
            found.append(f"knowledge_tasks names {unknown}, which task_names ({self.task_names}) does not have.")
        if self.balance_weight and self.balance_delta and self.knowledge_tasks is None:
            found.append(
                "balance_delta needs to know which tasks are of world knowledge: set knowledge_tasks (and task_names), "
                "or balance_delta=0 for a balance that treats all tasks alike."
            )
        return found


def loss(config: LoraMoeConfig, inputs: LossInputs) -> Tensor | None:
    """Localized balance loss plus the router's own, each with its weight."""
    total = router_loss(config, inputs)
    if config.balance_weight and inputs.gate is not None:
        gate, tokens = inputs.gate.t(), inputs.tokens
        # an expert's tokens are of no row that could be known: their load is balanced as that of one
        rows, count = tokens.rows(gate.device), tokens.batch
        if rows is None:
            rows, count = torch.zeros(len(gate), dtype=torch.long, device=gate.device), 1
        keep = tokens.keep()
        load = per_row(gate, count, keep, rows)
        # a row that only fills the batch has no load at all, which is no imbalance
        there = None if keep is None else (load.sum(1) > 0).to(load.dtype)
        knowledge = torch.zeros(count, dtype=torch.bool, device=gate.device)
        if config.balance_delta:
            tasks = tokens.tasks(config, gate.device)
            if tasks is None:
                raise missing(config)
            kinds = torch.tensor([name in (config.knowledge_tasks or ()) for name in config.task_names or ()])
            # the row's last token decides where ids are for each token
            knowledge = knowledge.index_put((rows,), kinds.to(gate.device)[tasks])
        balance = config.balance_weight * localized_balance(load, knowledge, config.balance_delta, there)
        total = balance if total is None else total + balance
    return total


METHOD = Method(
    name="loramoe",
    config=LoraMoeConfig,
    heads=lambda config: config.num_experts,
    shared_stem=False,
    gate=TokenRouter(),
    start=start,
    shared=shared_router,
    group=block_group,
    loss=Loss(loss, ("balance_weight", *ROUTER_LOSS.weights)),
)
