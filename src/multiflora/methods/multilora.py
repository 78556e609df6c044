r"""MultiLoRA: n parallel LoRA modules whose learned scales start at zero (Wang et al. 2023, arXiv 2311.11501).

.. math:: y = W x + s \sum_{i=1}^{n} g_i \odot (B_i A_i x), \qquad g_i = 0 \text{ at the start}

A_i and B_i both start Kaiming-uniform, so the update spreads over many directions; the zero scales g, not a zero B,
make the first step the base model. The gate reads nothing, so the sum is one matrix and merges exactly.

The paper labels one scale per module; both published re-implementations learn one per output feature. That is the
default here (``scale_shape="vector"``), "scalar" is the paper's figure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from multiflora.methods.base import Method
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import ScaleGate
from multiflora.methods.initial import kaiming_uniform, random_heads
from multiflora.methods.method_card import MethodCard

CARD = MethodCard(
    name="multilora",
    title="MultiLoRA",
    line="n parallel LoRAs with learned scales that start at zero: many directions share the work.",
    paper="arXiv 2311.11501",
    settings=("num_modules", "scale_shape", "use_alpha"),
    merges="exactly",
    experts="with target_parameters",
    config="MultiLoraConfig",
)


@dataclass
class MultiLoraConfig(AdapterConfig):
    """MultiLoRA (arXiv 2311.11501): ``num_modules`` parallel LoRAs of rank ``r`` with learned scales.

    Compare it with one LoRA of rank ``num_modules * r``, which can represent the same updates.

    Example:
        >>> MultiLoraConfig(r=4, num_modules=3, target_modules="all-linear").num_modules
        3
    """

    method_name: ClassVar[str] = "multilora"
    heads_setting: ClassVar[str] = "num_modules"

    num_modules: Union[int, list[int]] = field(  # noqa: UP007
        default=3, metadata={"help": "How many LoRA modules run in parallel (n)."}
    )
    scale_shape: str = field(
        default="vector",
        metadata={"help": "Learned scale per output feature ('vector') or per module ('scalar')."},
    )
    use_alpha: bool = field(
        default=True, metadata={"help": "Keep alpha/r besides the learned scale, as re-implementations do."}
    )

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "scale_shape", ("vector", "scalar")),
        ]


def start(config: MultiLoraConfig, A: Tensor, B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """Kaiming-uniform stems (fan in d_in) and heads (fan in r)."""
    kaiming_uniform(A, generator)
    random_heads(B, heads, generator)


def scale_width(config: Any, d_out: int) -> int:
    """Numbers per module in the learned scale."""
    return d_out if config.scale_shape == "vector" else 1


METHOD = Method(
    name="multilora",
    config=MultiLoraConfig,
    heads=lambda config: config.num_modules,
    shared_stem=False,
    gate=ScaleGate(width=scale_width),
    alpha_over=lambda config: config.use_alpha,
    start=start,
)
