r"""A sum of your own: any stem, any heads, any gate, with or without the offset, spelled out in the settings.

.. math:: y = W x + s \sum_h g_h(x, \text{task})\, B_h\,(m_h \odot M_t A_{\sigma(h)} x) - s\,\bar B^0 A^0 x

Every other multi-branch method here is one choice of these parts; this one leaves the choice to the recipe. What it
refuses are choices that cannot learn, or whose first step would not be the base model.

=============  ==============================================================================================
part           choices
=============  ==============================================================================================
stem           "shared": one A for all heads; "own": one each
heads          "zero" (LoRA's start) or "random" (R-LoRA's; for the gate "scale", MultiLoRA's)
gate           "sum", "mean", "scale", "token" (with or without ``top_k``), "task", "task_embedding"
offset         takes a random start off again, as R-LoRA does
head_dropout   masks A x for each head by itself
task_matrix    "none", or a matrix per task between a shared stem and the heads: "full" or "diagonal"
=============  ==============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from multiflora.methods import mixlora, multilora, rlora
from multiflora.methods.base import Method, TaskMatrix
from multiflora.methods.block_router import block_group, shared_router
from multiflora.methods.config import one_of
from multiflora.methods.gates import FixedGate, Gate, ScaleGate, TaskEmbeddingGate, TaskTemperatureGate, TokenRouter
from multiflora.methods.initial import kaiming_uniform, random_heads, stem_and_zero_heads
from multiflora.methods.method_card import MethodCard
from multiflora.methods.mtllora import task_matrix_shape
from multiflora.methods.router import ROUTER_LOSS, RouterConfig

CARD = MethodCard(
    name="parts",
    title="Parts",
    line="A sum of your own: any stem, heads, gate and offset, spelled out in the recipe.",
    paper="–",
    settings=(
        "num_heads",
        "stem",
        "heads",
        "gate",
        "offset",
        "head_dropout",
        "task_matrix",
        "router_init",
        "gamma",
        "scale_shape",
        "temperature",
        "task_embedding_dim",
        "frozen",
        "top_k",
        "router_balance_loss",
        "router_z_loss",
        "router_per",
    ),
    merges="depends (on the gate)",
    experts="with target_parameters",
    config="PartsConfig",
)

GATES: dict[str, Gate] = {
    "sum": Gate(),
    "mean": FixedGate(value=lambda config: 1 / config.num_heads),
    "scale": ScaleGate(width=multilora.scale_width),
    "token": TokenRouter(
        zero=lambda config: config.router_init == "zero",
        std=lambda config: mixlora.ROUTER_STD if config.router_init == "normal" else None,
    ),
    "task": TaskTemperatureGate(),
    "task_embedding": TaskEmbeddingGate(),
}


@dataclass
class PartsConfig(RouterConfig):
    """A method spelled out from the parts; see `multiflora.methods.parts`.

    Example:
        >>> config = PartsConfig(stem="own", gate="token", num_heads=4, top_k=2, router_balance_loss=0.01)
        >>> PartsConfig(heads="random", gate="mean")
        Traceback (most recent call last):
        ...
        multiflora.errors.ConfigError: PartsConfig: heads='random' with gate='mean' would not start as the base model: \
set offset=True, which takes the start off, or heads='zero'.
    """

    method_name: ClassVar[str] = "parts"

    num_heads: Union[int, list[int]] = field(  # noqa: UP007
        default=3, metadata={"help": "How many heads B (N)."}
    )
    stem: str = field(default="shared", metadata={"help": "One A for all heads ('shared') or one each ('own')."})
    heads: str = field(default="zero", metadata={"help": "How the heads start: 'zero' or 'random'."})
    gate: str = field(
        default="token",
        metadata={"help": "What blends the heads: 'sum', 'mean', 'scale', 'token', 'task' or 'task_embedding'."},
    )
    offset: bool = field(default=False, metadata={"help": "Take the random start off, as a frozen low-rank term."})
    head_dropout: float = field(default=0.0, metadata={"help": "Dropout on A x, drawn for each head, in [0, 1)."})
    task_matrix: str = field(
        default="none", metadata={"help": "Matrix per task after a shared A: 'none', 'full' or 'diagonal'."}
    )
    router_init: str = field(
        default="kaiming",
        metadata={"help": "Start of the router: 'kaiming', 'normal' (MixLoRA's, of deviation 0.02) or 'zero'."},
    )
    gamma: float = field(default=64.0, metadata={"help": "Divides the variance of a random start."})
    scale_shape: str = field(default="vector", metadata={"help": "Gate 'scale': per output feature, or 'scalar'."})
    temperature: float = field(default=0.1, metadata={"help": "Gate 'task': temperature of the tasks' softmax."})
    task_embedding_dim: int = field(default=64, metadata={"help": "Gate 'task_embedding': width of the embedding."})
    frozen: Optional[list[str]] = field(  # noqa: UP045
        default=None,
        metadata={"help": "Tensors that are not trained, such as ['A', 'B'], where experts are there already."},
    )

    def problems(self) -> list[str]:
        """See the base class."""
        found = [
            *one_of(self, "stem", ("shared", "own")),
            *one_of(self, "heads", ("zero", "random")),
            *one_of(self, "gate", tuple(GATES)),
            *one_of(self, "task_matrix", ("none", "full", "diagonal")),
            *one_of(self, "router_init", ("kaiming", "normal", "zero")),
            *one_of(self, "scale_shape", ("vector", "scalar")),
            *one_of(self, "init_weights", (True, False)),
        ]
        return [*super().problems(), *(found or misfits(self))]


def misfits(config: PartsConfig) -> list[str]:
    """Choices that do not go together, a sentence each."""
    found, gate, random = [], config.gate, config.heads == "random"
    if gate != "token":
        words = [name for name in ("top_k", "router_balance_loss", "router_z_loss") if getattr(config, name)]
        words += ["router_per"] if config.router_per != "layer" else []
        if words:
            found.append(f"{' and '.join(words)} belong to a router, and gate is {gate!r}: set gate='token'.")
    if config.task_matrix != "none" and config.stem == "own":
        found.append("task_matrix stands after a shared A, and stem is 'own': set stem='shared'.")
    if gate == "scale" and not random:
        found.append("gate='scale' starts at 0; with heads='zero' nothing would get a gradient: set heads='random'.")
    if random and gate != "scale" and not config.offset:
        found.append(
            f"heads='random' with gate={gate!r} would not start as the base model: set offset=True, which takes the "
            "start off, or heads='zero'."
        )
    if config.offset and (not random or gate == "scale"):
        found.append(f"offset takes a random start off; with heads={config.heads!r} and gate={gate!r} there is none.")
    equal = gate in ("sum", "mean") or (gate == "token" and config.router_init == "zero" and config.top_k is None)
    if config.offset and gate != "scale" and not equal:
        found.append(
            f"offset takes off what equal weights make of the heads, and gate={gate!r} starts otherwise: use 'sum', "
            "'mean', or 'token' with router_init='zero' and without top_k."
        )
    if config.top_k is not None and config.router_init == "zero":
        found.append(
            "router_init='zero' prefers no head, so top_k could not choose: set router_init='kaiming' or 'normal'."
        )
    alike = config.stem == "shared" and not random and equal and config.head_dropout == 0
    if alike and max(config.head_counts()) > 1 and config.init_weights is not False:
        found.append(
            "A shared stem, heads at zero and equal weights keep all heads identical for ever: set heads='random', "
            "stem='own', head_dropout above 0, or another gate."
        )
    names = chosen(config).parameter_names()
    strange = [name for name in config.frozen or () if name not in names]
    if strange:
        found.append(f"frozen holds {strange[0]!r}, and the tensors of these parts are {', '.join(names)}.")
    elif config.frozen and set(config.frozen) >= set(names):
        found.append(f"frozen holds all of {', '.join(names)}, so nothing would be trained. Leave one out.")
    return found


def start(config: PartsConfig, A: Tensor, B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """Heads at zero, or R-LoRA's random start, or MultiLoRA's where the learned scale starts at zero."""
    if config.init_weights is False:
        kaiming_uniform(A, generator)
        random_heads(B, heads, generator)
    elif config.heads == "zero":
        stem_and_zero_heads(config, A, B, heads, generator)
    elif config.gate == "scale":
        multilora.start(config, A, B, heads, generator)
    else:
        rlora.start(config, A, B, heads, generator)


@cache
def method_of_parts(stem: str, gate: str, task_matrix: str) -> Method:
    """The description with these parts; all else is read from the config."""
    return Method(
        name="parts",
        config=PartsConfig,
        heads=lambda config: config.num_heads,
        gate=GATES[gate],
        shared_stem=stem == "shared",
        start=start,
        shared=shared_router,
        group=block_group,
        offset=lambda config: config.offset and config.init_weights is not False,
        head_dropout=lambda config: config.head_dropout,
        task_matrix=None if task_matrix == "none" else TaskMatrix(shape=task_matrix_shape),
        loss=ROUTER_LOSS if gate == "token" else None,
        frozen=lambda config: tuple(config.frozen or ()),
    )


def chosen(config: Any) -> Method:
    """The description that a config spells out."""
    return method_of_parts(config.stem, config.gate, config.task_matrix)


METHOD = replace(
    method_of_parts("shared", "token", "none"),
    chosen=chosen,
    chosen_names=("A", "B", *(name for gate in GATES.values() for name in gate.names), "task_matrix"),
)
