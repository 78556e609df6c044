r"""Branches for every expert of a mixture, whose weights are fused parameters: see :mod:`multiflora.methods.fused`.

.. math:: y_e = W_e x + s \sum_h g_h(x, \text{task})\, B_{e,h}\,(m_h \odot A_{e,\sigma(h)} x) - s\,\bar B_e^0 A_e^0 x

Each expert e has the method's tensors for itself, one under another in an axis of their own: A is (E, K r, d_in). They
are looked at where the experts' products are, between the router that has chosen the experts and the activation, so the
whole experts module is replaced (:class:`AdaptedExperts`): tokens are brought together by expert, and both products are
made as transformers makes them, with the branches added. A token's task goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multiflora import ops
from multiflora.context import Routing
from multiflora.errors import AdapterError
from multiflora.forward_pass import Tokens
from multiflora.methods.base import Method, Parts, class_of
from multiflora.methods.gates import TaskGate
from multiflora.methods.inference import Kept
from multiflora.methods.layer_pass import BranchLayer
from multiflora.methods.layer_weights import Plan, layer_names
from multiflora.methods.middle import Made

__all__ = ["AdaptedExperts", "BranchExperts", "FusedWeight", "Pairs", "experts_class"]


class Pairs(NamedTuple):
    """Tokens and the experts that were chosen for them, S = T times k in all, by expert."""

    expert: Tensor
    """The expert of each, (S,), from 0 up."""
    token: Tensor
    """The token of each, (S,)."""
    ends: Tensor
    """Where each expert's end, (E,), int32."""
    order: Tensor
    """Where each was in (T, k), as one axis, (S,)."""
    lead: torch.Size
    """The shape of the tokens, (T,)."""
    names: Sequence[str] | None = None
    """The adapter of each row of the batch, where rows have different ones."""
    rows: Sequence[int] | None = None
    """The rows that these are of; None: all."""

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int, names: Sequence[str] | None = None) -> Pairs:
        """Sort by expert, an expert's tokens in their own order.

        Args:
            chosen: Experts of each token, (T, k).
            num_experts: E.
            names: The adapter of each row.

        Example:
            >>> pairs = Pairs.of(torch.tensor([[1, 0], [1, 2]]), 3)
            >>> pairs.expert.tolist(), pairs.token.tolist(), pairs.ends.tolist()
            ([0, 1, 1, 2], [0, 0, 1, 1], [1, 3, 4])
        """
        expert, order = torch.sort(chosen.reshape(-1), stable=True)
        return cls(expert, order // chosen.shape[1], _ends(expert, num_experts), order, chosen.shape[:1], names)

    def some(self, at: Tensor, rows: Sequence[int]) -> Pairs:
        """Those at the places `at`, in order, which are of these rows."""
        expert = self.expert[at]
        return self._replace(
            expert=expert, token=self.token[at], ends=_ends(expert, len(self.ends)), order=self.order[at], rows=rows
        )

    def times(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        """A matrix of each expert, (E, m, n), times its tokens, (n, S): see `multiflora.methods.middle.Where`."""
        return ops.expert_times(matrix, tokens, self.ends)

    def of_task(self, table: Tensor, tasks: Tensor) -> Tensor:
        """Each token's row of its expert's table, (E, num_tasks, ...)."""
        return table[self.expert, tasks]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has tokens, and where these are. It waits for the device."""
        start = 0
        for e, end in enumerate(self.ends.tolist()):
            if end > start:
                yield e, slice(start, end)
            start = end


def _ends(expert: Tensor, num_experts: int) -> Tensor:
    return torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True, out_int32=True)


class FusedWeight(nn.Module):
    """One fused parameter as a layer: each token times its expert's matrix, plus the bias. It holds nothing itself."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.held_by = (experts, name)  # in a tuple: as a submodule of its own it would be saved once more
        self.num_experts, self.out_features, self.in_features = self.matrices().shape

    @property
    def weight(self) -> Tensor:
        """The parameter, in the model's own layout."""
        experts, name = self.held_by
        found: Tensor = getattr(experts, name)
        return found

    @property
    def is_transposed(self) -> bool:
        """Whether a matrix is (d_in, d_out)."""
        return bool(self.held_by[0].is_transposed)

    def matrices(self) -> Tensor:
        """(E, d_out, d_in)."""
        return self.weight.mT if self.is_transposed else self.weight

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """The product for x, (S, d_in), in the parameter's dtype."""
        experts, name = self.held_by
        weight = self.matrices()
        y = ops.grouped(x.to(weight.dtype), weight, pairs.ends)
        return y + getattr(experts, f"{name}_bias")[pairs.expert] if experts.has_bias else y


class BranchExperts(BranchLayer):
    """One fused parameter of a mixture with branches for each expert; see the module's sum."""

    def __init__(self, experts: nn.Module, parameter: str, routing: Routing, name: str) -> None:
        fused = FusedWeight(experts, parameter)
        super().__init__(fused, routing, name)
        self.num_experts = fused.num_experts

    def _widths(self) -> tuple[int, int]:
        fused: Any = self.base_layer
        return fused.in_features, fused.out_features

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        fused: Any = self.base_layer
        return (fused.num_experts, *shape)

    def _each(self, adapter_name: str, parts: Parts) -> Iterator[Parts]:
        shared = self.plan(adapter_name).shared
        for e in range(self.num_experts):
            yield {name: part if name in shared else part[e] for name, part in parts.items()}

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors))

    def _mapped(self, adapter_name: str, function: Callable[[Parts], Tensor], parts: Parts) -> Tensor:
        """What a method's function makes of each expert's tensors, (E, ...), with its gradient."""
        shared = self.plan(adapter_name).shared
        found: Tensor = torch.vmap(function, in_dims=({name: None if name in shared else 0 for name in parts},))(parts)
        return found

    def adding(self) -> list[str]:
        """The adapters whose branches are added now."""
        return [] if self._base_alone() else [name for name in self.active_adapters if name in self.configs]

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """The experts' product for x, (S, d_in), and the active adapters' branches."""
        y: Tensor = self.base_layer(x, pairs)
        if pairs.names is not None:
            return self._mixed_batch(x.to(y.dtype), y, pairs.names, pairs)
        for name in self.adding():
            y = self._add_branches(x.to(y.dtype), y, name, pairs)
        return y

    def _mixed_batch(self, x: Tensor, y: Tensor, names: Sequence[str], pairs: Pairs) -> Tensor:
        tokens = self._tokens(x, pairs)
        self._check_names(names, tokens.batch)
        of = tokens.rows(x.device)
        if of is None:
            raise AdapterError(
                f"{self.name} sees {pairs.lead.numel()} tokens of a batch of {tokens.batch} rows, and not all of each "
                "row: which adapter each needs cannot be known. Give each adapter a batch of its own, with set_adapter."
            )
        for name in dict.fromkeys(names):
            if name in self.configs:
                rows = [i for i, other in enumerate(names) if other == name]
                at = torch.isin(of, torch.tensor(rows, device=of.device)).nonzero().squeeze(1)
                y = y.index_copy(0, at, self._add_branches(x[at], y[at], name, pairs.some(at, rows)))
        return y

    def _tokens(self, x: Tensor, pairs: Pairs) -> Tokens:
        return self.routing.tokens(self.name, x, pairs.lead)._replace(order=pairs.token)

    def _add_branches(self, x: Tensor, y: Tensor, adapter_name: str, pairs: Pairs) -> Tensor:
        plan, loops = self.plan(adapter_name), self._loops()
        kept = None if loops else self._prepared.get(self, plan, adapter_name, x.dtype, pairs.rows)
        if kept is not None:
            return ops.infer_experts(x, kept.branches, y, pairs.ends, gate=self._gate(kept, plan, x, pairs))
        parts = self.parts(adapter_name)
        loss, tokens, tasks = self._loss(adapter_name, plan), None, None
        if self._asks(plan, loss):
            tokens = self._tokens(x, pairs)
            tasks = self._tasks(plan, tokens, x, pairs.rows)
        add = self._by_expert if loops else self._packed
        y, stems, gate, logits = add(x, y, adapter_name, parts, tasks, pairs)
        self._record(gate, tasks, tokens)
        if loss is None or tokens is None:
            return y
        values, each = [], list(self._each(adapter_name, parts))
        for e, span in pairs.spans():  # each expert has heads of its own, so its loss is that of its own tokens
            own = tokens._replace(order=pairs.token[span])
            seen = stems[:, span], _columns(gate, span), _columns(logits, span)
            values.append(self._value(loss, plan, *seen, own, each[e]))
        told = [value for value in values if value is not None]
        return self.routing.report(adapter_name, torch.stack(told).mean(), y) if told else y

    def _gate(self, kept: Kept, plan: Plan, x: Tensor, pairs: Pairs) -> Tensor | None:
        """Weights of the heads where rows of several tasks are computed together, (S, H)."""
        if kept.table is None:
            return None
        return kept.table[pairs.expert, self._tasks(plan, self._tokens(x, pairs), x, pairs.rows)]

    def _packed(
        self, x: Tensor, y: Tensor, adapter_name: str, parts: Parts, tasks: Tensor | None, pairs: Pairs
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The sum as grouped products: y, and the stems', gates and logits of each pair, tokens last."""
        plan = self.plan(adapter_name)
        config, method, gate = plan.config, plan.method, plan.method.gate
        u, logits, u0 = ops.expert_stems(
            x,
            parts["A"],
            parts.get("router"),
            parts.get("A0"),
            pairs.ends,
            scale=self.scaling[adapter_name],
            dropout=self._dropout("lora_dropout", adapter_name),
        )
        v, logits = method.inner(config, parts, Made(u, logits, tasks, self.scaling[adapter_name]), pairs)
        if isinstance(gate, TaskGate):
            table = self._mapped(adapter_name, lambda own: gate.table(config, own), parts)
            weights: Tensor | None = table.to(x.device)[pairs.expert, tasks].t()
        else:
            weights = gate.weights(config, parts, logits, tasks)
        y = ops.expert_heads(
            y,
            v,
            u0,
            weights,
            self._mapped(adapter_name, lambda own: gate.fold(config, own, own["B"]), parts),
            parts.get("B0"),
            pairs.ends,
            num_heads=plan.heads,
            rank=plan.rank,
            dropout=self._dropout("head_dropout", adapter_name),
        )
        return y, u, weights, logits

    def _by_expert(
        self, x: Tensor, y: Tensor, adapter_name: str, parts: Parts, tasks: Tensor | None, pairs: Pairs
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The same, expert by expert and head by head."""
        each = list(self._each(adapter_name, parts))
        found = [
            self._looped(x[span], y[span], adapter_name, each[e], None if tasks is None else tasks[span])
            for e, span in pairs.spans()
        ]
        gates = [one.gate for one in found if one.gate is not None]
        logits = [one.logits for one in found if one.logits is not None]
        return (
            torch.cat([y[:0], *(one.y for one in found)]),
            torch.cat([one.stems for one in found], 1),
            torch.cat(gates, 1) if gates else None,
            torch.cat(logits, 1) if logits else None,
        )

    # ---- merging ----------------------------------------------------------------------------------------------------

    def _has_weight(self) -> bool:
        return True  # others were refused before the adapter was made

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        fused: Any = self.base_layer
        return (B @ A).mT if fused.is_transposed else B @ A


def _columns(tensor: Tensor | None, span: slice) -> Tensor | None:
    return None if tensor is None else tensor[:, span]


class AdaptedExperts(nn.Module):
    """A mixture's experts with adapters: in the place of transformers' module, which it holds as ``base_layer``."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts

    def layers(self) -> dict[str, BranchExperts]:
        """The adapted parameters, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, BranchExperts)}

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: Sequence[str] | None = None,
    ) -> Tensor:
        """The experts' answers for tokens, (T, d), summed with the router's weights, (T, k).

        Rows of the batch may have adapters of their own, by `adapter_names`.
        """
        experts: Any = self.base_layer
        layers = self.layers()
        if adapter_names is None and not any(layer.adding() for layer in layers.values()):
            base: Tensor = experts(hidden_states, top_k_index, top_k_weights)
            return base
        pairs = Pairs.of(top_k_index, experts.num_experts, adapter_names)
        products = {
            name: layers.get(name) or FusedWeight(experts, name)
            for name in ("gate_up_proj", "up_proj", "down_proj")
            if hasattr(experts, name)
        }
        first = products.get("gate_up_proj") or products["up_proj"]
        x = first(hidden_states[pairs.token], pairs)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = products["down_proj"](x, pairs)
        if getattr(experts, "has_post_expert_norm", False):
            x = experts.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[pairs.order].unsqueeze(-1)
        back = torch.empty_like(pairs.order).scatter_(0, pairs.order, torch.arange(len(x), device=x.device))
        summed: Tensor = x[back].view(*top_k_index.shape, -1).sum(1)
        return summed.to(hidden_states.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the experts back, with the adapters merged or without them; peft calls this."""
        if merge:
            for layer in self.layers().values():
                layer.merge(safe_merge, adapter_names)
        experts: nn.Module = self.base_layer
        return experts


@cache
def experts_class(method: Method) -> type[BranchExperts]:
    """The layer class of a method's fused experts; no "Linear" in its name, by which ``all-linear`` would find it."""
    names = {**layer_names(method), "__doc__": f"Fused experts with {method.name} branches.", "__module__": __name__}
    return type(f"{method.config.__name__.removesuffix('Config')}Experts", (BranchExperts,), names)


def __getattr__(name: str) -> type:
    return class_of(name, "Experts", experts_class)
