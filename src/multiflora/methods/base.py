r"""A method is a description. Everything else — forward, merge, conversion, counts — is derived from it.

.. math:: y = W x + s \sum_h g_h(x, \text{task})\, B_h\,(m_h \odot M A_{\sigma(h)} x) - s\,\bar B^0 A^0 x

The description says how many heads there are, whether each has a stem A of its own or all share one, what the gate g
reads, how A and B start, whether the random start is taken off again (the frozen offset :math:`\bar B^0 A^0`),
whether a matrix M of the task or of the token stands between stem and heads, and what is added to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from multiflora.errors import ExportError
from multiflora.methods import METHODS
from multiflora.methods.gates import Gate
from multiflora.methods.initial import head_views, stem_and_zero_heads
from multiflora.methods.middle import Made, Middle, Where

if TYPE_CHECKING:
    from multiflora.forward_pass import Tokens
    from multiflora.methods.config import AdapterConfig

Parts = Mapping[str, Tensor]
Start = Callable[[Any, Tensor, Tensor, int, "torch.Generator | None"], None]
Merges = Literal["exactly", "per task", "no"]


class LossInputs(NamedTuple):
    """What one layer made of a batch in training: all that a method's loss may read. Tokens come last."""

    stems: Tensor
    """s A x of each token, (K r, T)."""
    gate: Tensor | None
    """Weight of each head, (H, T); None where all weigh 1."""
    logits: Tensor | None
    """The router's, (H, T), or None where there is no router."""
    tokens: Tokens
    """Which rows, tasks and padding they are."""
    parts: Parts
    """The layer's tensors, by their names in the equation; of experts, those of one expert."""


@dataclass(frozen=True)
class Loss:
    """What a method adds to the loss, layer by layer; the model's is the mean over the layers."""

    value: Callable[[Any, LossInputs], Tensor | None]
    """(config, what it reads of the layer) -> what to add, or None where nothing can be said."""
    weights: tuple[str, ...]
    """Settings that turn it on: where all of them are 0, it is off and nobody asks for its value."""
    reads_task: bool = False
    """Whether it needs the row's task, where the output does not."""

    def on(self, config: Any) -> bool:
        """Whether this config wants it."""
        return any(getattr(config, weight) for weight in self.weights)


def _no(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Method:
    """One multi-branch method, as a value."""

    name: str
    """The word recipes use."""
    config: type[AdapterConfig]
    heads: Callable[[Any], int]
    """How many heads H a config asks for."""
    gate: Gate
    shared_stem: bool = True
    """One A for all heads, or one each."""
    rank: Callable[[Any, int], int] = lambda config, r: r
    """Rank of a branch, given the (pattern-resolved) r."""
    alpha_over: Callable[[Any], bool] = lambda config: True
    """Whether s = alpha/r applies; otherwise s = 1."""
    start: Start = stem_and_zero_heads
    """Fills A, (K r, d_in), and B, (d_out, H r), in place."""
    offset: Callable[[Any], bool] = _no
    """Whether the random start is subtracted as a frozen low-rank term."""
    head_dropout: Callable[[Any], float] = lambda config: 0.0
    """Dropout on each head's input."""
    frozen: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Names of the tensors that are not trained."""
    middle: Middle | None = None
    """What stands between stems and heads, if anything does."""
    shared: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Names of the tensors that layers have in common; the first of these holds them."""
    group: Callable[[Any, str], str] = lambda config, name: ""
    """(config, a layer's name) -> those with which it has them in common: all for which this is the same."""
    loss: Loss | None = None
    moving: Callable[[Any, Parts], tuple[Tensor, Tensor]] | None = None
    """(config, parts) -> A⁰ and B⁰ of a frozen term that follows the trained weights, in place of the stored offset."""
    gradient_start: Callable[[Any, Tensor, int], tuple[Tensor, Tensor]] | None = None
    """(config, gradient of the whole weight, r) -> A and B to start from, see `multiflora.methods.gradient_pass`."""
    after_step: Callable[[Any, Iterable[Parts], int], None] | None = None
    """(config, every layer's parts, steps done): what follows each step of the optimiser."""
    why_not_mergeable: str | None = None
    """One sentence, for methods whose update is no matrix for another reason than what their gate reads."""
    chosen: Callable[[Any], Method] | None = None
    """For a method whose parts are settings: (config) -> the method with these parts."""
    chosen_names: tuple[str, ...] = ()
    """Names of all trainable tensors that any of those may have."""

    def of(self, config: Any) -> Method:
        """The description that holds for a config: this one, unless its parts are settings."""
        return self if self.chosen is None else self.chosen(config)

    def needs_task(self) -> bool:
        """Whether an output cannot be computed without the row's task."""
        return self.gate.reads == "task" or (self.middle is not None and self.middle.reads == "task")

    def loss_needs_task(self, config: Any) -> bool:
        """Whether what is added cannot be computed without the row's task."""
        return self.loss is not None and self.loss.reads_task and self.loss.on(config)

    def refuses_merge(self) -> str | None:
        """Why the update is no matrix, in a sentence; None where it is one, or one for each task.

        It follows from what the gate reads (a router's logits are those of the token), so that no method can forget it.
        """
        if self.why_not_mergeable is not None:
            return self.why_not_mergeable
        by_token = self.middle is not None and self.middle.reads == "token"
        if self.gate.reads != "token" and "router" not in self.gate.names and not by_token:
            return None
        return (
            f"A {self.name} adapter cannot be merged: its router reads the input, so no single weight matrix equals "
            "it. Keep the adapter, or use `multiflora convert` for plain LoRA with a reported error."
        )

    def refuses_experts(self, config: Any) -> str | None:
        """Why the fused experts of a mixture cannot have such branches, in a sentence; None where they can."""
        if self.gradient_start is not None or self.moving is not None or self.after_step is not None:
            return (
                f"{self.name} looks at the gradient or the steps of a whole weight, of linear layers alone. Leave "
                "target_parameters out, or take another method."
            )
        if self.loss_needs_task(config):
            return (
                f"The loss of {self.name} compares tasks within a layer, and an expert sees too few tokens of each. "
                f"Set {' and '.join(self.loss.weights if self.loss else ())} to 0, or leave target_parameters out."
            )
        return None

    def merges(self) -> Merges:
        """Whether the update is one matrix, one for each task, or none."""
        if self.refuses_merge() is not None:
            return "no"
        return "per task" if self.needs_task() else "exactly"

    def scaling(self, config: Any, r: int, alpha: float) -> float:
        r"""The factor s: :math:`\alpha/r`, or :math:`\alpha/\sqrt r` with ``use_rslora``; r as in the config."""
        if not self.alpha_over(config):
            return 1.0
        return alpha / math.sqrt(r) if config.use_rslora else alpha / r

    def stems(self, config: Any) -> int:
        """How many stems there are, K."""
        if self.middle is not None:
            return self.middle.stems(config)
        return 1 if self.shared_stem else self.heads(config)

    def shapes(self, config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Every trainable tensor of one adapted layer, by name."""
        heads, rank = self.heads(config), self.rank(config, r)
        shapes: dict[str, tuple[int, ...]] = {"A": (self.stems(config) * rank, d_in), "B": (d_out, heads * rank)}
        shapes |= self.gate.shapes(config, heads, rank if self.gate.of_stem else d_in, d_out)
        if self.middle is not None:
            shapes |= self.middle.shapes(config, rank, d_in)
        return shapes

    def parameter_names(self) -> tuple[str, ...]:
        """Names of the trainable tensors, whatever the config."""
        if self.chosen is not None:
            return self.chosen_names
        return ("A", "B", *self.gate.names, *(() if self.middle is None else self.middle.names))

    def fill(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        """Give every tensor its first value, in place."""
        self.start(config, parts["A"], parts["B"], self.heads(config), generator)
        self.gate.start(config, parts, generator)
        if self.middle is not None:
            self.middle.start(config, parts, generator)

    def inner(self, config: Any, parts: Parts, made: Made, where: Where) -> tuple[Tensor, Tensor | None]:
        """What the heads read, v, (r, T) for all or (H r, T) for each; and the logits that the gate looks at."""
        v = made.u if self.middle is None else self.middle.read(config, parts, made, where)
        if not self.gate.of_stem:
            return v, made.logits
        return v, self.gate.look(parts, v, self.heads(config), made.scale, where.times)

    def mean_head(self, config: Any, parts: Parts) -> Tensor:
        r""":math:`\bar B^0`: the heads blended as a gate that prefers none would blend them.

        (d_out, r) for a shared stem; with a stem for each head they stay side by side, (d_out, H r).
        """
        heads = self.heads(config)
        B = self.gate.fold(config, parts, parts["B"].detach())
        total = torch.stack(head_views(B, heads)).sum(0) if self.shared_stem else B
        return total if self.gate.reads == "nothing" else total / heads

    def frozen_term(self, config: Any, parts: Parts) -> tuple[Tensor, Tensor] | None:
        r""":math:`A^0`, (k, d_in), and :math:`\bar B^0`, (d_out, k), of the frozen term -s B̄⁰A⁰x; None without one."""
        if self.moving is not None:
            return self.moving(config, parts)
        return (parts["A0"], parts["B0"]) if "A0" in parts else None

    def offset_rank(self, config: Any, r: int) -> int:
        """The rank of the stored offset; 0 without one."""
        return self.stems(config) * self.rank(config, r) if self.offset(config) else 0

    def frozen_rank(self, config: Any, r: int) -> int:
        """k of the frozen term, the stored offset and what moves along; 0 without one."""
        return self.offset_rank(config, r) + (0 if self.moving is None else self.rank(config, r))

    def factors(
        self,
        config: Any,
        parts: Parts,
        gate: Tensor,
        scale: float,
        task: int | None = None,
        blend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""The update as one plain LoRA: A' (k, d_in) and B' (d_out, k) with :math:`\Delta W = B' A'`, in float32.

        Args:
            config: The adapter's config.
            parts: The layer's tensors.
            gate: Weight of each head, (H,).
            scale: s.
            task: Index of the task, for methods with a matrix per task.
            blend: Weights, (n,), of what a router blends between stems and heads; None: all alike.

        Returns:
            A' and B'; k is r for a shared stem, K r for several, plus r for the offset.
        """
        wide = {name: part.detach().to(torch.promote_types(part.dtype, torch.float32)) for name, part in parts.items()}
        heads = self.heads(config)
        A = wide["A"]
        B = self.gate.fold(config, wide, wide["B"])
        weighted = torch.stack(head_views(B, heads), 1) * (gate.to(B.device, B.dtype) * scale).view(1, heads, 1)
        columns = weighted.sum(1) if self.shared_stem else weighted.reshape(B.shape[0], -1)
        if self.middle is not None:
            columns = columns @ self.middle.constant(config, wide, task, blend)
        frozen = self.frozen_term(config, wide)
        if frozen is not None:
            A, columns = torch.cat((A, frozen[0])), torch.cat((columns, -scale * frozen[1]), 1)
        return A, columns

    def static_gate(self, config: Any, parts: Parts, task: int | None) -> Tensor:
        """The gate (H,) of a method whose update is a matrix (for the given task).

        Raises:
            ExportError: The gate reads the input, or needs a task and none is given.
        """
        refusal = self.refuses_merge()
        if refusal is not None:
            raise ExportError(refusal)
        if self.needs_task() and task is None:
            raise ExportError(
                f"A {self.name} adapter has one weight per task, and no task is set. Merge inside "
                f"`with multiflora.task(model, TASK):`; its tasks are {task_list(config)}."
            )
        return self.gate.constant(config, parts, self.heads(config), task)


def task_list(config: Any) -> str:
    """The tasks of a config for a message: names, or the range of ids."""
    if config.task_names:
        return ", ".join(config.task_names)
    return f"0 to {config.num_tasks - 1}" if config.num_tasks else "unknown (the config names none)"


def class_of(name: str, suffix: str, make: Callable[[Method], type]) -> type:
    """A class made from a method's description, by its name: for pickle, which knows no other way to find one.

    Raises:
        AttributeError: No method gives a class that name.
    """
    for card in METHODS.values():
        if card.module is not None and card.config is not None and name == card.config.removesuffix("Config") + suffix:
            return make(import_module(card.module).METHOD)
    raise AttributeError(f"There is no class {name!r} here.")
