r"""MTL-LoRA: a matrix per task between a shared A and blended heads (Yang et al. 2024, arXiv 2410.09437).

.. math:: y = W x + s \sum_{h=1}^{N} \operatorname{softmax}(w_t/\tau)_h\, B_h\, \Lambda_t A x

Λ_t starts at the identity, B at zero. Everything that depends on the row depends on its task t alone, so the update
merges exactly for each task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Union

from multiflora.methods.base import Method
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import TaskTemperatureGate
from multiflora.methods.hydralora import start
from multiflora.methods.method_card import MethodCard
from multiflora.methods.middle import TaskMatrix

CARD = MethodCard(
    name="mtllora",
    title="MTL-LoRA",
    line="A learned matrix per task between a shared A and heads blended by the task.",
    paper="arXiv 2410.09437",
    settings=("num_heads", "temperature", "task_matrix"),
    merges="per task",
    experts="with target_parameters",
    config="MtlLoraConfig",
)


@dataclass
class MtlLoraConfig(AdapterConfig):
    """MTL-LoRA (arXiv 2410.09437): a learned r x r matrix per task between the shared A and ``num_heads`` heads.

    Defaults: rank 8, alpha 16, 3 heads and temperature 0.1 of the published scripts, dropout 0.05 of their code.

    Example:
        >>> MtlLoraConfig(task_names=["boolq", "piqa"], target_modules=["q_proj", "v_proj"]).num_tasks
        2
    """

    method_name: ClassVar[str] = "mtllora"
    heads_setting: ClassVar[str] = "num_heads"

    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the stem, in [0, 1)."})
    num_heads: Union[int, list[int]] = field(  # noqa: UP007
        default=3, metadata={"help": "How many heads B (N)."}
    )
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the tasks' softmax over heads."})
    task_matrix: str = field(default="full", metadata={"help": "Matrix per task: 'full' (r x r) or 'diagonal' (r)."})

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "task_matrix", ("full", "diagonal")),
            *one_of(self, "init_weights", (True, False)),
        ]


METHOD = Method(
    name="mtllora",
    config=MtlLoraConfig,
    heads=lambda config: config.num_heads,
    gate=TaskTemperatureGate(),
    middle=TaskMatrix(),
    start=start,
)
