r"""A sum of your own: any stem, any heads, any gate, with or without the offset, spelled out in the settings.

.. math:: y = W x + s \sum_h g_h(x, \text{task})\, B_h\,(m_h \odot M A_{\sigma(h)} x) - s\,\bar B^0 A^0 x

Every other multi-branch method here is one choice of these parts; this one leaves the choice to the recipe. What it
refuses are choices that cannot learn, or whose first step would not be the base model.

=============  ==============================================================================================
part           choices
=============  ==============================================================================================
stem           "shared": one A for all heads; "own": one each; "blended": several that a router on x blends into one
               for all heads; as LoRA's start, or sparse (``stem_init``)
heads          "zero" (LoRA's start) or "random" (R-LoRA's; for the gate "scale", MultiLoRA's)
gate           "sum", "mean", "scale", "token" (with or without ``top_k``), "task", "task_embedding"; on the token
               also "stem", a router on A x, and "largest", the ``top_k`` heads of the largest A_h x
offset         takes a random start off again, as R-LoRA does
head_dropout   masks A x for each head by itself
task_matrix    "none", or a matrix per task between a shared stem and the heads: "full" or "diagonal"
core           "none", or there as many as ``num_cores``, which a router on A x blends: "full" or "diagonal"
=============  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from multiflora.methods import mixlora, multilora, rlora
from multiflora.methods.base import Loss, LossInputs, Method
from multiflora.methods.block_router import block_group, shared_router
from multiflora.methods.config import one_of
from multiflora.methods.gates import (
    FixedGate,
    Gate,
    LargestGate,
    ScaleGate,
    StemRouter,
    TaskEmbeddingGate,
    TaskTemperatureGate,
    TokenRouter,
)
from multiflora.methods.initial import head_views, kaiming_uniform, random_heads, sparse, stem_and_zero_heads
from multiflora.methods.losses import entropy, overlap
from multiflora.methods.method_card import MethodCard
from multiflora.methods.middle import CoreRouter, Middle, RoutedMatrix, StemBlend, TaskMatrix
from multiflora.methods.router import ROUTER_LOSS, RouterConfig, router_loss

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
        "num_stems",
        "core",
        "num_cores",
        "router_init",
        "router_scores",
        "stem_init",
        "gamma",
        "scale_shape",
        "temperature",
        "task_embedding_dim",
        "frozen",
        "top_k",
        "router_balance_loss",
        "router_z_loss",
        "router_entropy_loss",
        "orthogonality_loss",
        "router_per",
    ),
    merges="depends (on the gate)",
    experts="with target_parameters",
    config="PartsConfig",
)


def zero_router(config: PartsConfig) -> bool:
    """Whether the router prefers no head at first."""
    return config.router_init == "zero"


def router_std(config: PartsConfig) -> float | None:
    """Standard deviation of a normal start."""
    return mixlora.ROUTER_STD if config.router_init == "normal" else None


def sigmoid_scores(config: PartsConfig) -> bool:
    """Whether each head has a score of its own."""
    return config.router_scores == "sigmoid"


GATES: dict[str, Gate] = {
    "sum": Gate(),
    "mean": FixedGate(value=lambda config: 1 / config.num_heads),
    "scale": ScaleGate(width=multilora.scale_width),
    "token": TokenRouter(zero=zero_router, std=router_std, sigmoid=sigmoid_scores),
    "stem": StemRouter(zero=zero_router, std=router_std, sigmoid=sigmoid_scores),
    "largest": LargestGate(),
    "task": TaskTemperatureGate(),
    "task_embedding": TaskEmbeddingGate(),
}

STEMS: dict[str, Callable[[Any], int]] = {
    "shared": lambda config: 1,
    "own": lambda config: config.num_heads,
    "blended": lambda config: config.num_stems,
}
"""How many A there are."""
ROUTED = ("token", "stem")
"""Gates with a router."""
ROUTER_WEIGHTS = (*ROUTER_LOSS.weights, "router_entropy_loss")
"""Of the losses that need a router."""


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
    stem: str = field(
        default="shared",
        metadata={"help": "One A for all heads ('shared'), one each ('own'), or several made one ('blended')."},
    )
    heads: str = field(default="zero", metadata={"help": "How the heads start: 'zero' or 'random'."})
    gate: str = field(
        default="token",
        metadata={
            "help": "What blends the heads: 'sum', 'mean', 'scale', 'token', 'stem', 'largest', 'task' or "
            "'task_embedding'."
        },
    )
    offset: bool = field(default=False, metadata={"help": "Take the random start off, as a frozen low-rank term."})
    head_dropout: float = field(default=0.0, metadata={"help": "Dropout on A x, drawn for each head, in [0, 1)."})
    task_matrix: str = field(
        default="none", metadata={"help": "Matrix per task after a shared A: 'none', 'full' or 'diagonal'."}
    )
    num_stems: int = field(default=3, metadata={"help": "Stem 'blended': how many A a router on x blends."})
    core: str = field(
        default="none",
        metadata={"help": "Matrices after a shared A that a router on A x blends: 'none', 'full' or 'diagonal'."},
    )
    num_cores: int = field(default=4, metadata={"help": "How many core matrices."})
    router_init: str = field(
        default="kaiming",
        metadata={"help": "Start of the router: 'kaiming', 'normal' (MixLoRA's, of deviation 0.02) or 'zero'."},
    )
    router_scores: str = field(
        default="softmax",
        metadata={"help": "How a router's logits become weights: 'softmax', or 'sigmoid' over its sum (SMoRA's)."},
    )
    stem_init: str = field(
        default="kaiming",
        metadata={"help": "Start of A: 'kaiming', or 'sparse', top_k/num_heads of each row normal (FlyLoRA's)."},
    )
    gamma: float = field(default=64.0, metadata={"help": "Divides the variance of a random start."})
    scale_shape: str = field(default="vector", metadata={"help": "Gate 'scale': per output feature, or 'scalar'."})
    temperature: float = field(default=0.1, metadata={"help": "Gate 'task': temperature of the tasks' softmax."})
    task_embedding_dim: int = field(default=64, metadata={"help": "Gate 'task_embedding': width of the embedding."})
    frozen: Optional[list[str]] = field(  # noqa: UP045
        default=None,
        metadata={"help": "Tensors that are not trained, such as ['A', 'B'], where experts are there already."},
    )
    router_entropy_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of the router's mean entropy: above 0 it decides, below 0 it spreads."},
    )
    orthogonality_loss: float = field(
        default=0.0, metadata={"help": "Weight of what heads, and stems of their own, have in common (D²MoRA's)."}
    )

    def problems(self) -> list[str]:
        """See the base class."""
        found = [
            *one_of(self, "stem", tuple(STEMS)),
            *one_of(self, "heads", ("zero", "random")),
            *one_of(self, "gate", tuple(GATES)),
            *one_of(self, "task_matrix", ("none", "full", "diagonal")),
            *one_of(self, "core", ("none", "full", "diagonal")),
            *one_of(self, "router_init", ("kaiming", "normal", "zero")),
            *one_of(self, "router_scores", ("softmax", "sigmoid")),
            *one_of(self, "stem_init", ("kaiming", "sparse")),
            *one_of(self, "scale_shape", ("vector", "scalar")),
            *one_of(self, "init_weights", (True, False)),
        ]
        return [*super().problems(), *(found or misfits(self))]


def misfits(config: PartsConfig) -> list[str]:
    """Choices that do not go together, a sentence each."""
    found, gate, random = [], config.gate, config.heads == "random"
    routed = gate in ROUTED
    if not routed:
        words = [name for name in ("top_k", *ROUTER_WEIGHTS) if getattr(config, name)]
        words += ["router_scores"] if sigmoid_scores(config) else []
        words = [name for name in words if name != "top_k" or gate != "largest"]
        if words:
            found.append(f"{' and '.join(words)} belong to a router, and gate is {gate!r}: set gate='token' or 'stem'.")
    if gate != "token" and config.router_per != "layer":
        found.append(f"router_per belongs to a router on x, and gate is {gate!r}: set gate='token'.")
    if gate == "stem" and config.stem == "own":
        found.append("gate='stem' looks at the A x that all heads read, and stem is 'own': set stem='shared'.")
    if gate == "largest" and config.stem != "own":
        found.append(f"gate='largest' compares each head's own A x, and stem is {config.stem!r}: set stem='own'.")
    if gate == "largest" and config.top_k is None:
        found.append("gate='largest' needs to know how many heads take part: set top_k.")
    if config.stem_init == "sparse" and config.top_k is None:
        found.append("stem_init='sparse' fills top_k/num_heads of each row, and top_k is not given: set it.")
    for matrix in ("task_matrix", "core"):
        if getattr(config, matrix) != "none" and config.stem != "shared":
            found.append(f"{matrix} stands after a shared A, and stem is {config.stem!r}: set stem='shared'.")
    if config.task_matrix != "none" and config.core != "none":
        found.append("task_matrix and core stand in one place, after a shared A: set one of them to 'none'.")
    if config.core != "none" and zero_router(config):
        found.append("router_init='zero' would keep all core matrices alike for ever: set 'kaiming' or 'normal'.")
    if config.stem == "blended" and gate == "token":
        found.append("stem='blended' has the router on x, and gate='token' would be another: set gate='stem'.")
    for number, used in (("num_stems", config.stem == "blended"), ("num_cores", config.core != "none")):
        if used and getattr(config, number) < 2:
            found.append(
                f"{number} is {getattr(config, number)}, and a router blends two or more: set it to 2 at least."
            )
    if config.stem == "blended" and config.offset:
        found.append("offset takes off one A, and stem='blended' has several: set offset=False.")
    if gate == "scale" and not random:
        found.append("gate='scale' starts at 0; with heads='zero' nothing would get a gradient: set heads='random'.")
    if random and gate != "scale" and not config.offset:
        found.append(
            f"heads='random' with gate={gate!r} would not start as the base model: set offset=True, which takes the "
            "start off, or heads='zero'."
        )
    if config.offset and (not random or gate == "scale"):
        found.append(f"offset takes a random start off; with heads={config.heads!r} and gate={gate!r} there is none.")
    equal = gate in ("sum", "mean") or (routed and zero_router(config) and config.top_k is None)
    if config.offset and gate != "scale" and not equal:
        found.append(
            f"offset takes off what equal weights make of the heads, and gate={gate!r} starts otherwise: use 'sum', "
            "'mean', or 'token' or 'stem' with router_init='zero' and without top_k."
        )
    if routed and config.top_k is not None and zero_router(config):
        found.append(
            "router_init='zero' prefers no head, so top_k could not choose: set router_init='kaiming' or 'normal'."
        )
    alike = config.stem != "own" and not random and equal and config.head_dropout == 0
    if alike and max(config.head_counts()) > 1 and config.init_weights is not False:
        found.append(
            "One A x for all, heads at zero and equal weights keep all heads identical for ever: set heads='random', "
            "stem='own', head_dropout above 0, or another gate."
        )
    if config.orthogonality_loss and max(config.head_counts()) == 1 and config.stem != "blended":
        found.append("orthogonality_loss compares heads, and num_heads is 1: set it to 0, or num_heads to 2 or more.")
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
    if config.stem_init == "sparse" and config.init_weights is not False:
        sparse(A, round(A.shape[1] * (config.top_k or heads) / heads), 1 / A.shape[0], generator)


def loss(config: Any, inputs: LossInputs) -> Tensor | None:
    """The router's losses, and what heads and stems have in common, each with its weight."""
    terms = [router_loss(config, inputs)]
    if config.router_entropy_loss and inputs.logits is not None:
        terms.append(config.router_entropy_loss * entropy(inputs.logits.t(), inputs.tokens.keep()))
    if config.orthogonality_loss:
        A, B = inputs.parts["A"], inputs.parts["B"]
        stems = A.view(STEMS[config.stem](config), -1, A.shape[1])
        terms.append(
            config.orthogonality_loss * (overlap(torch.stack(head_views(B, config.num_heads))) + overlap(stems))
        )
    told = [term for term in terms if term is not None]
    return sum(told[1:], told[0]) if told else None


def middle_of(stem: str, task_matrix: str, core: str) -> Middle | None:
    """What stands between stems and heads."""
    if stem == "blended":
        return StemBlend(TokenRouter(zero=zero_router, std=router_std, top_k=lambda config: None), STEMS["blended"])
    if core != "none":
        return RoutedMatrix(CoreRouter(std=router_std, top_k=lambda config: None))
    return None if task_matrix == "none" else TaskMatrix()


@cache
def method_of_parts(stem: str, gate: str, task_matrix: str, core: str) -> Method:
    """The description with these parts; all else is read from the config."""
    return Method(
        name="parts",
        config=PartsConfig,
        heads=lambda config: config.num_heads,
        gate=GATES[gate],
        shared_stem=stem != "own",
        start=start,
        shared=shared_router,
        group=block_group,
        offset=lambda config: config.offset and config.init_weights is not False,
        head_dropout=lambda config: config.head_dropout,
        middle=middle_of(stem, task_matrix, core),
        loss=Loss(loss, (*(ROUTER_WEIGHTS if gate in ROUTED else ()), "orthogonality_loss")),
        frozen=lambda config: tuple(config.frozen or ()),
    )


def chosen(config: Any) -> Method:
    """The description that a config spells out."""
    return method_of_parts(config.stem, config.gate, config.task_matrix, config.core)


METHOD = replace(
    method_of_parts("shared", "token", "none", "none"),
    chosen=chosen,
    chosen_names=(
        "A",
        "B",
        *(name for gate in GATES.values() for name in gate.names),
        "task_matrix",
        "core",
        "core_router",
    ),
)
