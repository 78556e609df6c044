r"""An adapter's branches prepared for inference: stacked, scaled and cast once, not for every token.

.. math:: S = [s A_1; \dots; s A_K;\; R;\; -s A^0], \qquad C = [B_1 \mid \dots \mid B_H \mid \bar B^0]^\top

Where the gate is the same for every token, the update is a plain LoRA (:meth:`Method.factors`), and S and C are
its two factors: of the adapter, or of the one task that all rows of a batch have. A token router's rows stand in S.
What is prepared is kept on the layer until something that it was made of changes: see :meth:`Kept.holds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from multiflora import ops
from multiflora.methods.base import Method, Parts
from multiflora.methods.gates import TaskGate, TokenRouter

if TYPE_CHECKING:
    from multiflora.methods.layer_weights import BranchWeights, Plan

__all__ = ["Kept", "Store", "Wanted", "can_prepare", "keep", "prepare"]


class Wanted(NamedTuple):
    """For what branches are prepared."""

    adapter: str
    dtype: torch.dtype
    """In which the layer computes."""
    task: int | None
    """The one task of all rows, for methods that need it; None: rows of several tasks, or no matter."""


@dataclass
class Kept:
    """Prepared branches, and what they were made of."""

    branches: ops.Prepared
    table: Tensor | None
    """Weight of each head for each task, (num_tasks, H), where rows of several tasks are computed together; of experts,
    (E, num_tasks, H)."""
    adapter: str
    sources: tuple[tuple[Mapping[str, Tensor | None], Tensor, int, int], ...]
    """Of every tensor that went in: where the layer holds it; the tensor; its version, in which torch counts every
    change in place; its address, since ``tensor.data = other`` is not counted, but moves."""
    settings: tuple[Any, ...]
    digest: int | None
    """Of the sources' bytes; None where nobody is fast enough to make one."""
    compared: int
    """The forward pass in which the bytes were last looked at."""

    def holds(self, settings: tuple[Any, ...], forward_pass: int | None) -> bool:
        """Whether what was prepared is still what the adapter is.

        Tensors are compared by identity, version and address in every call. A change through ``.data`` shows in none of
        the three, so once in every forward pass that starts anew, and in every call of a layer by itself, the bytes are
        compared, too.

        Args:
            settings: All else that matters, as it is now.
            forward_pass: Number of the pass; None outside of one.
        """
        if settings != self.settings:
            return False
        adapter = self.adapter
        for place, tensor, version, address in self.sources:
            if place.get(adapter) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        if forward_pass is None or forward_pass > self.compared:
            if self.digest is None or self.digest != ops.digest([tensor for _, tensor, _, _ in self.sources]):
                return False
            self.compared = -1 if forward_pass is None else forward_pass
        return True


class Store:
    """What one layer keeps prepared."""

    MOST = 16
    """Forms of several adapters, tasks and number types."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()

    def get(
        self,
        layer: BranchWeights,
        plan: Plan,
        adapter_name: str,
        dtype: torch.dtype,
        rows: Sequence[int] | None = None,
    ) -> Kept | None:
        """The adapter's branches, as they were kept or made anew; None where they must not be prepared.

        They are not in training, where gradients are on or gates are recorded, under ``torch.compile``, and of methods
        that have no prepared form. `rows` are those that the adapter serves, in a batch of several adapters.
        """
        routing = layer.routing
        if (
            not plan.can_prepare
            or layer.training
            or torch.is_grad_enabled()
            or routing.recorder is not None
            or torch.compiler.is_compiling()
        ):
            return None
        task = routing.now().one_task(plan.config, rows) if plan.needs_task else None
        kept = self._kept.get((adapter_name, dtype, task))
        settings = (layer.scaling[adapter_name], plan.config.changes)
        if kept is not None and kept.holds(settings, routing.number):
            return kept
        wanted = Wanted(adapter_name, dtype, task)
        kept = keep(layer, plan, wanted, settings, routing.number)
        self._kept.pop(wanted, None)
        if kept is not None:
            self._kept[wanted] = kept
        if len(self._kept) > self.MOST:
            self._kept.pop(next(iter(self._kept)))
        return kept


def can_prepare(method: Method, config: Any) -> bool:
    """Whether branches have a prepared form: their gate is constant, looked up by task, or a router's softmax of x.

    What looks at A x has none: its numbers come between the two products.
    """
    gate = method.gate
    if gate.reads == "token":
        return type(gate) is TokenRouter and not gate.sigmoid(config) and method.middle is None
    return (gate.reads == "nothing" or isinstance(gate, TaskGate)) and not (
        method.middle is not None and method.middle.reads == "token"
    )


def keep(
    layer: BranchWeights, plan: Plan, wanted: Wanted, settings: tuple[Any, ...], forward_pass: int | None
) -> Kept | None:
    """Prepare an adapter's branches; None where this adapter's tensors cannot be watched, or have no prepared form.

    Args:
        layer: Which holds the tensors.
        plan: Of the adapter.
        wanted: For what.
        settings: s, and all else that matters, to be compared later.
        forward_pass: Number of the pass; None outside of one.
    """
    places = layer.places(wanted.adapter)
    parts = {part: tensor for part, place in places.items() if (tensor := place.get(wanted.adapter)) is not None}
    if any(part.is_inference() or part.is_meta for part in parts.values()):
        return None  # made inside torch.inference_mode: torch does not count their changes
    each = (prepare(plan, own, settings[0], wanted.dtype, wanted.task) for own in layer._each(wanted.adapter, parts))
    made = [one for one in each if one is not None]  # of a mixture's experts, all or none
    if not made:
        return None
    forms, tables = [form for form, _ in made], [table for _, table in made if table is not None]
    branches = forms[0]._replace(
        rows=layer._joined([form.rows for form in forms]), columns=layer._joined([form.columns for form in forms])
    )
    table = layer._joined(tables) if tables else None
    sources = tuple((places[name], part, part._version, part.data_ptr()) for name, part in parts.items())
    compared = -1 if forward_pass is None else forward_pass
    return Kept(branches, table, wanted.adapter, sources, settings, ops.digest(list(parts.values())), compared)


@torch.no_grad()
def prepare(
    plan: Plan, parts: Parts, scale: float, dtype: torch.dtype, task: int | None
) -> tuple[ops.Prepared, Tensor | None] | None:
    """Stack, scale and cast an adapter's branches; None where they have no prepared form.

    Args:
        plan: Of the adapter.
        parts: Its tensors on this layer.
        scale: s.
        dtype: In which the layer computes.
        task: The one task of all rows, for methods that need it; None: rows of several tasks, or no matter.

    Returns:
        The branches; and the weight of each head for each task, (num_tasks, H), where rows of several tasks are
        computed together.
    """
    method, config = plan.method, plan.config
    if plan.of_block:  # whose gate is made once, by its first layer
        return _side_by_side(plan, parts, scale, dtype, router=None, top_k=None), None
    if method.gate.reads == "token":
        return _routed(plan, parts, scale, dtype), None
    if task is not None or not method.needs_task():
        return _plain(plan, parts, scale, dtype, task), None
    if method.middle is None and isinstance(method.gate, TaskGate):
        branches = _side_by_side(plan, parts, scale, dtype, router=None, top_k=None)
        return branches, method.gate.table(config, parts).contiguous()
    return None


def _plain(plan: Plan, parts: Parts, scale: float, dtype: torch.dtype, task: int | None) -> ops.Prepared:
    """One pair of factors, without a gate."""
    method, config = plan.method, plan.config
    gate = method.gate.constant(config, parts, plan.heads, task)
    A, B = method.factors(config, parts, gate, scale, task)
    rows, columns = A.to(dtype).contiguous(), B.t().to(dtype).contiguous()
    return ops.Prepared(rows, columns, 1, len(rows), routed=False, top_k=0)


def _routed(plan: Plan, parts: Parts, scale: float, dtype: torch.dtype) -> ops.Prepared:
    gate = plan.method.gate
    assert isinstance(gate, TokenRouter)
    return _side_by_side(plan, parts, scale, dtype, router=parts["router"], top_k=gate.top_k(plan.config))


def _side_by_side(
    plan: Plan, parts: Parts, scale: float, dtype: torch.dtype, *, router: Tensor | None, top_k: int | None
) -> ops.Prepared:
    """All stems one under another and all heads side by side, for a gate that changes from token to token."""
    method, config = plan.method, plan.config
    A0, B0 = method.frozen_term(config, parts) or (None, None)
    wide = torch.promote_types(parts["A"].dtype, torch.float32)
    rows = [parts["A"].to(wide) * scale]
    if router is not None:
        rows.append(router.to(wide))
    columns = [method.gate.fold(config, parts, parts["B"]).to(wide)]
    if A0 is not None and B0 is not None:
        rows.append(A0.to(wide) * -scale)
        columns.append(B0.to(wide))
    return ops.Prepared(
        torch.cat(rows).to(dtype).contiguous(),
        torch.cat(columns, 1).t().to(dtype).contiguous(),
        plan.heads,
        plan.rank,
        routed=router is not None,
        top_k=top_k or 0,
    )
