"""The forward pass of one adapted linear layer: picks the adapter, calls the pure functions.

One class per method is made by :func:`layer_class`; they differ in nothing but the method they hold and the names of
their parameters, which carry the method's peft prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from multiflora import ops
from multiflora.forward_pass import Tokens
from multiflora.methods.base import Loss, Method, class_of
from multiflora.methods.inference import Kept
from multiflora.methods.layer_pass import BranchLayer
from multiflora.methods.layer_weights import Plan, layer_names
from multiflora.methods.middle import ONE_LAYER, Made


class BranchLinear(BranchLayer):
    """A frozen linear layer with branches added to its output; see :mod:`multiflora.methods.base` for the sum."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' branches, in the base output's dtype and x's shape."""
        if not (args or kwargs or torch.is_grad_enabled()) and (inferred := self._infer(x)) is not None:
            return inferred
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self._base_alone():
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        active = self.active_adapters
        if len(active) == 1 and active[0] in self.configs and not args and not kwargs and self._base_is_plain(x):
            base: Any = self._modules["base_layer"]  # an attribute of a module is a slow look-up
            return self._branches(x, active[0], base=(x, base._parameters["weight"], base._parameters["bias"]))
        active = [name for name in active if name in self.configs]
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if active and self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for name in active:
            y = self._add_branches(x, y, name)
        return y

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        self._check_names(adapter_names, len(x))
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name not in self.configs:
                continue
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            at = torch.tensor(rows, device=x.device)
            y = y.index_copy(0, at, self._add_branches(x[at], y[at], name, rows=rows, of=len(adapter_names)))
        return y

    def add_to(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        """The base layer's output y for x, and an adapter's branches: what a batch of several adapters adds to rows.

        The rows' tasks are those of the routing state, which must have been told of these rows alone.
        """
        return self._add_branches(x, y, adapter_name)

    def _base_is_plain(self, x: Tensor) -> bool:
        """Whether the base product can be taken together with the stems': a frozen ``nn.Linear`` nobody hooks into."""
        base: Any = self._modules["base_layer"]
        if not _is_bare(base, x) or self._loops():
            return False
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        return (
            not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not (base._backward_hooks or base._backward_pre_hooks)
        )

    def _add_branches(
        self, x: Tensor, y: Tensor, adapter_name: str, rows: Sequence[int] | None = None, of: int | None = None
    ) -> Tensor:
        add = self._loop if self._loops() else self._branches
        return add(x.to(_compute_dtype(x)), adapter_name, y=y, rows=rows, of=of)

    def _branches(
        self,
        x: Tensor,
        adapter_name: str,
        *,
        y: Tensor | None = None,
        base: ops.Base | None = None,
        rows: Sequence[int] | None = None,
        of: int | None = None,
    ) -> Tensor:
        """The packed sum for x, (..., d_in): added to y, or with the base product taken along."""
        plan, parts = self.plans.get(adapter_name) or self.plan(adapter_name), self.parts(adapter_name)
        config, method = plan.config, plan.method
        kept = self._prepared.get(self, plan, adapter_name, x.dtype, rows)
        if kept is not None:
            return ops.infer(x, kept.branches, base, y=y, gate=self._gate(kept, plan, adapter_name, x, rows, of))
        loss = self._loss(adapter_name, plan)
        tokens = self._tokens(plan, x, rows, of, loss)
        tasks = None if tokens is None else self._tasks(plan, tokens, x, rows)
        router, (A0, B0) = self._router(adapter_name, parts), method.frozen_term(config, parts) or (None, None)
        if plan.left_to_op and loss is None:
            summed, gate = ops.branches(
                x,
                parts["A"],
                router,
                A0,
                method.gate.fold(config, parts, parts["B"]),
                B0,
                y,
                base,
                num_heads=plan.heads,
                rank=plan.rank,
                scale=self.scaling[adapter_name],
                stem_dropout=self._dropout("lora_dropout", adapter_name),
                head_dropout=self._dropout("head_dropout", adapter_name),
            )
            self._record(gate, tasks, tokens)
            return summed
        place, u, logits, u0 = ops.stems(
            x,
            parts["A"],
            router,
            A0,
            None if base is None else base[1],
            scale=self.scaling[adapter_name],
            dropout=self._dropout("lora_dropout", adapter_name),
        )
        v = u
        if plan.looks_inside:
            made = Made(u, logits, tasks, self.scaling[adapter_name])
            v, logits = method.inner(config, parts, made, ONE_LAYER)
        gate = self._head_weights(plan, adapter_name, parts, logits, tasks, u.shape[1])
        # a shared gate is looked at once, where it is made
        seen = None if adapter_name in self.holders else gate
        value = self._value(loss, plan, u, seen, logits, tokens, parts)
        self._record(gate, tasks, tokens)
        summed = ops.heads(
            place if y is None else y,  # type: ignore[arg-type]  # one of the two is there
            v,
            u0,
            gate,
            method.gate.fold(config, parts, parts["B"]),
            B0,
            base,
            num_heads=plan.heads,
            rank=plan.rank,
            dropout=self._dropout("head_dropout", adapter_name),
        )
        return summed if value is None else self.routing.report(adapter_name, value, summed)

    def _infer(self, x: Tensor) -> Tensor | None:
        """The output without gradients, of a plain layer with one adapter; None where it is not that simple."""
        # each line is paid for by every layer for every token, and more dearly than it looks: the caches are full of
        # the last layer's weights
        state = self.__dict__
        active, base = state["_active_adapter"], state["_modules"]["base_layer"]
        if state["_disable_adapters"] or state["merged_adapters"] or len(active) != 1 or type(active) is str:
            return None
        plan = state["plans"].get(active[0])
        if plan is None or not _is_bare(base, x) or self._loops():
            return None
        kept = state["_prepared"].get(self, plan, active[0], x.dtype)
        if kept is None:
            return None
        gate = None if kept.table is None and not plan.of_block else self._gate(kept, plan, active[0], x)
        own = base._parameters
        return ops.infer(x, kept.branches, (x, own["weight"], own["bias"]), gate=gate)

    def _gate(
        self,
        kept: Kept,
        plan: Plan,
        adapter_name: str,
        x: Tensor,
        rows: Sequence[int] | None = None,
        of: int | None = None,
    ) -> Tensor | None:
        """Weights of the heads that no branches make by themselves, (T, H): of several tasks' rows, or of a block."""
        if plan.of_block:
            parts, flat = self.parts(adapter_name), x.reshape(-1, x.shape[-1])
            router = self._router(adapter_name, parts)
            logits = None if router is None else F.linear(flat, router.to(x.dtype)).t()
            made = self._head_weights(plan, adapter_name, parts, logits, None, len(flat))
            return None if made is None else made.t().contiguous()
        if kept.table is None:
            return None
        tokens = self._tokens(plan, x, rows, of, None)
        assert tokens is not None
        return kept.table[self._tasks(plan, tokens, x, rows)]

    def _loop(
        self, x: Tensor, adapter_name: str, *, y: Tensor, rows: Sequence[int] | None = None, of: int | None = None
    ) -> Tensor:
        """The same, head by head."""
        plan = self.plan(adapter_name)
        loss = self._loss(adapter_name, plan)
        tokens = self._tokens(plan, x, rows, of, loss)
        tasks = None if tokens is None else self._tasks(plan, tokens, x, rows)
        shape, x, y = y.shape, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        parts = self.parts(adapter_name)
        y, stems, gate, logits = self._looped(x, y, adapter_name, parts, tasks)
        seen = None if adapter_name in self.holders else gate
        value = self._value(loss, plan, stems, seen, logits, tokens, parts)
        self._record(gate, tasks, tokens)
        y = y.view(shape)
        return y if value is None else self.routing.report(adapter_name, value, y)

    def _tokens(
        self, plan: Plan, x: Tensor, rows: Sequence[int] | None, of: int | None, loss: Loss | None
    ) -> Tokens | None:
        """What is known of the input's tokens; None where nobody asks."""
        if not self._asks(plan, loss):
            return None
        if rows is None or of is None:
            return self.routing.tokens(self.name, x)
        # a mixed batch: what is known is known of the whole batch, of which these are some rows
        lead = torch.Size([of, *x.shape[1:-1]])
        order = torch.arange(lead.numel(), device=x.device).view(of, -1)[list(rows)].reshape(-1)
        return self.routing.tokens(self.name, x, lead)._replace(order=order)


def _is_bare(base: Any, x: Tensor) -> bool:
    """Whether a layer's product is that of its weight and x alone: an ``nn.Linear`` that nobody hooks into."""
    if type(base) is not nn.Linear or torch.compiler.is_compiling():
        return False
    state = base.__dict__
    parameters = state["_parameters"]
    # neither is a parameter where pruning or weight norm computes it anew in each call
    weight = parameters.get("weight")
    return (
        # a quantised or sharded weight is a Tensor subclass, whose Parameter has that subclass's type
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == x.dtype == _compute_dtype(x)
        and "bias" in parameters
        and "forward" not in state
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Branches are computed in the dtype the base layer computes in: autocast's where it is on, else the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


@cache
def layer_class(method: Method) -> type[BranchLinear]:
    """The layer class of a method. Its name ends in "Linear": peft's ``all-linear`` knows adapted layers by that."""
    names = {
        **layer_names(method),
        "__doc__": f"A frozen linear layer with {method.name} branches.",
        "__module__": __name__,
    }
    return type(f"{method.config.__name__.removesuffix('Config')}Linear", (BranchLinear,), names)


def __getattr__(name: str) -> type:
    return class_of(name, "Linear", layer_class)
