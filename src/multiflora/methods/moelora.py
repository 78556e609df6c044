r"""MOELoRA: E low-rank experts blended by the task alone (Liu et al. 2023, arXiv 2310.18339).

.. math::
    y = W x + \tfrac{\alpha}{r} \sum_{e=1}^{E} \omega_e(t)\, B_e A_e x,
    \qquad \omega(t) = \operatorname{softmax}(W_T\, e_t)

r is the rank of all experts together: each has r / E. The gate sees only the row's task t, so for each task the sum is
one matrix and merges exactly. All layers have one gate in common, as in paper and code; with ``shared_gate=False`` each
has one of its own. A starts N(0, 0.01²), B at zero. The code draws a dropout mask on x for each expert; here one mask
serves all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Union

import torch
from torch import Tensor

from multiflora.methods.base import Method
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import TaskEmbeddingGate
from multiflora.methods.initial import kaiming_uniform, normal, random_heads
from multiflora.methods.method_card import MethodCard

CARD = MethodCard(
    name="moelora",
    title="MOELoRA",
    line="Low-rank experts blended by the task alone.",
    paper="arXiv 2310.18339",
    settings=("num_experts", "task_embedding_dim", "shared_gate"),
    merges="per task",
    experts="with target_parameters",
    config="MoeLoraConfig",
)


@dataclass
class MoeLoraConfig(AdapterConfig):
    """MOELoRA (arXiv 2310.18339): ``num_experts`` experts, gated by the row's task.

    Defaults: the published script's rank 16 over 8 experts, dropout 0.1, task embedding of 64.

    Example:
        >>> config = MoeLoraConfig(num_experts=4, task_names=["gsm8k", "sst2"], target_modules="all-linear")
        >>> config.num_tasks
        2
    """

    method_name: ClassVar[str] = "moelora"
    heads_setting: ClassVar[str] = "num_experts"

    r: int = field(default=16, metadata={"help": "Rank of all experts together; each has r / num_experts."})
    lora_alpha: float = field(default=32, metadata={"help": "alpha; the update is scaled by alpha/r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of the stems, in [0, 1)."})
    num_experts: Union[int, list[int]] = field(  # noqa: UP007
        default=8, metadata={"help": "How many experts (E); r must be a multiple of it."}
    )
    task_embedding_dim: int = field(default=64, metadata={"help": "Width of the learned embedding of a task."})
    shared_gate: bool = field(
        default=True, metadata={"help": "One gate for all layers (the paper's), or false: one for each layer."}
    )

    def problems(self) -> list[str]:
        """See the base class."""
        found = [
            *super().problems(),
            *one_of(self, "init_weights", (True, False)),
        ]
        if not found:
            for where, rank in {
                "r": self.r,
                **{f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()},
            }.items():
                experts = next((number for number in self.head_counts() if rank % number), None)
                if experts is not None:
                    found.append(f"{where} is {rank}; it must be a multiple of num_experts ({experts}).")
            if self.shared_gate and len(set(self.head_counts())) > 1:
                found.append(
                    f"Layers have {' or '.join(map(str, sorted(set(self.head_counts()))))} experts, and one gate for "
                    "all layers has one number of them: set shared_gate=False."
                )
        return found


def start(config: MoeLoraConfig, A: Tensor, B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """A ~ N(0, 0.01²) and B = 0, or everything random for tests."""
    if not config.init_weights:
        kaiming_uniform(A, generator)
        random_heads(B, heads, generator)
        return
    normal(A, 0.01, generator)
    if not B.is_meta:
        torch.nn.init.zeros_(B)


METHOD = Method(
    name="moelora",
    config=MoeLoraConfig,
    heads=lambda config: config.num_experts,
    rank=lambda config, r: r // config.num_experts,
    shared_stem=False,
    gate=TaskEmbeddingGate(),
    start=start,
    shared=lambda config: TaskEmbeddingGate.names if config.shared_gate else (),
)
