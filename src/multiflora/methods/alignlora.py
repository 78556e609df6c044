r"""Align-LoRA: one LoRA, and a loss that keeps tasks alike in A x (Liu et al. 2025, arXiv 2508.05078).

.. math::
    y = W x + s\, B A x, \qquad
    L = L_{\text{task}} + \lambda \operatorname{mean}_{\text{layers}} \operatorname{mean}_{i<j}
    \tfrac12 \left[ D_{KL}(P_i \Vert P_j) + D_{KL}(P_j \Vert P_i) \right]

P_i is the Gaussian, with independent coordinates, of what A makes of task i's tokens in the batch; see
``losses.alignment``. The task of each row is needed in training only: the update is one matrix and merges exactly.

Differs from the published code: there the mean and the variance are taken over the batch's rows at each position by
itself, padding included, and rows come sorted by task in equal parts. Here they are taken over all real tokens of a
task, which stands under padding, packing and unequal parts; and over each micro-batch by itself where gradients are
accumulated. A batch with one task adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from multiflora.methods.base import Loss, LossInputs, Method
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import Gate
from multiflora.methods.hydralora import start
from multiflora.methods.losses import alignment
from multiflora.methods.method_card import MethodCard
from multiflora.task_ids import missing

CARD = MethodCard(
    name="alignlora",
    title="Align-LoRA",
    line="One LoRA, and a loss that keeps the tasks' A x alike.",
    paper="arXiv 2508.05078",
    settings=("align_weight",),
    merges="exactly",
    experts="with target_parameters, and align_weight 0",
    config="AlignLoraConfig",
)


@dataclass
class AlignLoraConfig(AdapterConfig):
    """Align-LoRA (arXiv 2508.05078): LoRA with the alignment loss (KL) between tasks.

    Defaults: r 8, alpha 32 and λ 0.2 of the published script.

    Example:
        >>> AlignLoraConfig(task_names=["boolq", "piqa"], target_modules="all-linear").align_weight
        0.2
    """

    method_name: ClassVar[str] = "alignlora"

    lora_alpha: float = field(default=32, metadata={"help": "alpha; the update is scaled by alpha/r."})
    align_weight: float = field(default=0.2, metadata={"help": "Weight of the alignment loss (λ)."})

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "init_weights", (True, False)),
        ]


def loss(config: AlignLoraConfig, inputs: LossInputs) -> Tensor | None:
    """λ times the mean divergence between tasks."""
    if config.num_tasks == 1:
        return None
    tasks = inputs.tokens.tasks(config, inputs.stems.device)
    if tasks is None:
        raise missing(config)
    return config.align_weight * alignment(inputs.stems.t(), tasks, config.num_tasks or 1, inputs.tokens.keep())


METHOD = Method(
    name="alignlora",
    config=AlignLoraConfig,
    heads=lambda config: 1,
    gate=Gate(),
    start=start,
    loss=Loss(loss, ("align_weight",), reads_task=True),
)
