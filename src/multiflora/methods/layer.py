"""The shell around one adapted linear layer: owns weights, picks the adapter, calls the pure functions.

One class per method is made by :func:`layer_class`; they differ in nothing but the method they hold and the names of
their parameters, which carry the method's peft prefix.
"""

from __future__ import annotations

import warnings
import zlib
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multiflora import ops
from multiflora.context import Routing, missing
from multiflora.errors import AdapterError, ExportError
from multiflora.methods.base import Loss, Method, Seen, class_of
from multiflora.methods.config import AdapterConfig
from multiflora.peft_bridge import layer_widths, prefix, quantization_backend

OFFSET = ("A0", "B0")


class Plan(NamedTuple):
    """What each forward pass asks of an adapter's config, asked once: a small layer feels every look-up."""

    config: AdapterConfig
    method: Method
    """The class's method, or what the config spells out."""
    heads: int
    rank: int
    """Of each head."""
    stem_dropout: float
    head_dropout: float
    needs_task: bool
    left_to_op: bool
    """Whether the packed op needs nobody between stems and heads."""
    loss: Loss | None
    """The method's, where the config turns it on."""


class BranchLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with branches added to its output; see :mod:`multiflora.methods.base` for the sum."""

    method: Method

    def __init__(self, base_layer: nn.Module, routing: Routing, name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.name = name
        self.in_features, self.out_features = layer_widths(self.get_base_layer())
        self.quantization_backend = quantization_backend(self.get_base_layer(), quantization)
        self.configs: dict[str, AdapterConfig] = {}
        self.plans: dict[str, Plan] = {}
        self.ranks: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._trained = {part: self._attribute(part) for part in self.method.parameter_names()}
        self._frozen = {part: self._attribute(part) for part in OFFSET}
        for attribute in self._trained.values():
            setattr(self, attribute, nn.ParameterDict())
        for attribute in self._frozen.values():
            setattr(self, attribute, BufferDict(persistent=True))
        self._disable_adapters = False
        self.merged_adapters = []
        self._merged_tasks: dict[str, int | None] = {}

    def method_of(self, adapter_name: str) -> Method:
        """What the adapter is: the class's method, or what the adapter's config spells out."""
        return self.plan(adapter_name).method

    def plan(self, adapter_name: str) -> Plan:
        """What forward passes need to know of an adapter's config."""
        found = self.plans.get(adapter_name)
        if found is None:
            config = self.configs[adapter_name]
            method = self.method.of(config)
            found = self.plans[adapter_name] = Plan(
                config,
                method,
                method.heads(config),
                method.rank(config, self.ranks[adapter_name]),
                config.lora_dropout,
                method.head_dropout(config),
                method.needs_task(),
                method.between is None and method.gate.left_to_op(config),
                method.loss if method.loss is not None and method.loss.on(config) else None,
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plans": {}}  # a method holds functions, which cannot be pickled

    def _attribute(self, part: str) -> str:
        return f"{prefix(self.method.name)}{part}"

    def _weights(self, part: str) -> Any:
        return getattr(self, self._attribute(part))

    def parts(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's tensors on this layer, by their names in the equation."""
        # straight out of the containers' dictionaries: a look-up through nn.Module is slow, and each forward makes ten
        modules: dict[str, Any] = self._modules
        found = {}
        for part, attribute in self._trained.items():
            if (tensor := modules[attribute]._parameters.get(adapter_name)) is not None:
                found[part] = tensor
        for part, attribute in self._frozen.items():
            if (tensor := modules[attribute]._buffers.get(adapter_name)) is not None:
                found[part] = tensor
        return found

    def update_layer(self, adapter_name: str, config: AdapterConfig, r: int, alpha: float) -> None:
        """Add an adapter: make its tensors, fill them, put them beside the base weight."""
        method = self.method.of(config)
        self.configs[adapter_name] = config
        self.ranks[adapter_name] = r
        self.plans.pop(adapter_name, None)
        self.scaling[adapter_name] = method.scaling(config, r, alpha)
        for part, shape in method.shapes(config, r, self.in_features, self.out_features).items():
            self._weights(part)[adapter_name] = nn.Parameter(torch.empty(shape))
        generator = None
        if config.init_seed is not None:
            # each layer its own stream, the same whatever order layers are made in
            generator = torch.Generator().manual_seed(config.init_seed + zlib.crc32(self.name.encode()))
        method.fill(config, self.parts(adapter_name), generator)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if method.offset(config):
            # taken after the move: the offset has to be that of the weights as they are stored
            started = self.parts(adapter_name)
            offset = {"A0": started["A"].detach().clone(), "B0": method.mean_head(config, started).clone()}
            for part, value in offset.items():
                # with low_cpu_mem_usage weights stay without data until a file brings them; peft spares parameters
                # from moving meanwhile, but not buffers, so these are given data at once
                kept = torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value
                self._weights(part)[adapter_name] = kept
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' branches, in the base output's dtype and x's shape."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
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
        if len(adapter_names) != len(x):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name not in self.configs:
                continue
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            y = y.index_copy(0, rows, self._add_branches(x[rows], y[rows], name, rows=rows, of=len(adapter_names)))
        return y

    def add_to(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        """The base layer's output y for x, and an adapter's branches: what a batch of several adapters adds to rows.

        The rows' tasks are those of the routing state, which must have been told of these rows alone.
        """
        return self._add_branches(x, y, adapter_name)

    def _base_is_plain(self, x: Tensor) -> bool:
        """Whether the base product can be taken together with the stems': a frozen ``nn.Linear`` nobody hooks into."""
        base: Any = self._modules["base_layer"]
        if type(base) is not nn.Linear or torch.compiler.is_compiling() or self.routing.loop:
            return False
        parameters: dict[str, Any] = base._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        return (
            # a quantised or sharded weight is a Tensor subclass, whose Parameter has that subclass's type
            type(weight) in (nn.Parameter, Tensor)
            and weight.dtype == _compute_dtype(x) == x.dtype
            and not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        )

    def _add_branches(
        self, x: Tensor, y: Tensor, adapter_name: str, rows: Tensor | None = None, of: int | None = None
    ) -> Tensor:
        add = self._loop if self.routing.loop else self._branches
        return add(x.to(_compute_dtype(x)), adapter_name, y=y, rows=rows, of=of)

    def _branches(
        self,
        x: Tensor,
        adapter_name: str,
        *,
        y: Tensor | None = None,
        base: ops.Base | None = None,
        rows: Tensor | None = None,
        of: int | None = None,
    ) -> Tensor:
        """The packed sum for x, (..., d_in): added to y, or with the base product taken along."""
        plan, parts = self.plans.get(adapter_name) or self.plan(adapter_name), self.parts(adapter_name)
        config, method = plan.config, plan.method
        tasks = self._tasks(plan, x, rows, of) if plan.needs_task or self.routing.recorder is not None else None
        router, (A0, B0) = parts.get("router"), method.frozen_term(config, parts) or (None, None)
        if plan.left_to_op and not (self.training and plan.loss is not None):
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
                stem_dropout=self._dropout(plan.stem_dropout),
                head_dropout=self._dropout(plan.head_dropout),
            )
            self._record(gate, tasks)
            return summed
        place, u, logits, u0 = ops.stems(
            x,
            parts["A"],
            router,
            A0,
            None if base is None else base[1],
            scale=self.scaling[adapter_name],
            dropout=self._dropout(plan.stem_dropout),
        )
        stems = u
        if method.between is not None:
            matrices = method.between.matrices(parts)[tasks].to(u.dtype)
            u = (matrices @ u.t().unsqueeze(-1)).squeeze(-1).t().contiguous()
        gate = method.gate.weights(config, parts, logits, tasks)
        self._report(adapter_name, stems, gate, logits, tasks)
        return ops.heads(
            place if y is None else y,  # type: ignore[arg-type]  # one of the two is there
            u,
            u0,
            gate,
            method.gate.fold(config, parts, parts["B"]),
            B0,
            base,
            num_heads=plan.heads,
            rank=plan.rank,
            dropout=self._dropout(plan.head_dropout),
        )

    def _loop(
        self, x: Tensor, adapter_name: str, *, y: Tensor, rows: Tensor | None = None, of: int | None = None
    ) -> Tensor:
        """The same, head by head."""
        plan, parts = self.plan(adapter_name), self.parts(adapter_name)
        config, method = plan.config, plan.method
        tasks = self._tasks(plan, x, rows, of) if plan.needs_task or self.routing.recorder is not None else None
        shape, x, y = y.shape, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        p, seed = self._dropout(plan.stem_dropout)
        dropped = x * ops.dropout_mask(tuple(x.shape), p, seed, device=x.device, dtype=x.dtype) if p > 0 else x
        router = parts.get("router")
        logits = None if router is None else router.to(x.dtype) @ x.t()
        gate = method.gate.weights(config, parts, logits, tasks)
        scale = self.scaling[adapter_name]
        self._report(adapter_name, (F.linear(dropped, parts["A"].to(x.dtype)) * scale).t(), gate, logits, tasks)
        y = ops.loop(
            y,
            dropped,
            parts["A"],
            None if gate is None else gate.t(),
            method.gate.fold(config, parts, parts["B"]),
            None,
            None,
            between=None if method.between is None else method.between.matrices(parts)[tasks],
            scale=scale,
            num_heads=plan.heads,
            rank=plan.rank,
            dropout=self._dropout(plan.head_dropout),
        )
        frozen = method.frozen_term(config, parts)
        if frozen is not None:
            y = y - (F.linear(F.linear(x, frozen[0].to(x.dtype)), frozen[1].to(x.dtype)) * scale).to(y.dtype)
        return y.view(shape)

    def _dropout(self, p: float) -> ops.Dropout:
        """A mask's probability and a fresh seed; no dropout outside training."""
        return (p, ops.draw_seed()) if p > 0 and self.training else (0.0, 0)

    def _tasks(self, plan: Plan, x: Tensor, rows: Tensor | None, of: int | None) -> Tensor | None:
        """The task of each token, (T,); None where it is neither known nor needed."""
        config, lead = plan.config, x.shape[:-1]
        if rows is None:
            tasks = self.routing.tasks(config, lead, x.device)
        else:
            # a mixed batch: the ids are those of the whole batch, of which these are some rows
            assert of is not None
            whole = self.routing.tasks(config, torch.Size([of, *lead[1:]]), x.device)
            tasks = None if whole is None else whole.view(of, -1)[rows].reshape(-1)
        if tasks is None and plan.needs_task:
            raise missing(config)
        return tasks

    def _report(
        self, adapter_name: str, stems: Tensor, gate: Tensor | None, logits: Tensor | None, tasks: Tensor | None
    ) -> None:
        plan, routing = self.plan(adapter_name), self.routing
        if self.training and plan.loss is not None:
            seen = Seen(stems, gate, logits, routing, routing.layers.get(adapter_name, 1))
            loss = plan.loss.value(plan.config, seen)
            if loss is not None:
                routing.losses.append(loss)
        self._record(gate, tasks)

    def _record(self, gate: Tensor | None, tasks: Tensor | None) -> None:
        if gate is not None and self.routing.recorder is not None:
            self.routing.recorder(self.name, gate.detach().t(), tasks)

    # ---- merging ----------------------------------------------------------------------------------------------------

    def _task_to_merge(self, adapter_name: str) -> int | None:
        return self.routing.single(self.configs[adapter_name]) if self.method_of(adapter_name).needs_task() else None

    def factors(self, adapter_name: str, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The adapter's update here as a plain LoRA, A' (k, d_in) and B' (d_out, k); see ``Method.factors``.

        Args:
            adapter_name: Which adapter.
            gate: Weight of each head, (H,); None asks the method, which must not read the input.
            task: Index of the task, for methods gated by task.
        """
        config, parts, method = self.configs[adapter_name], self.parts(adapter_name), self.method_of(adapter_name)
        if gate is None:
            gate = method.static_gate(config, parts, task)
        return method.factors(config, parts, gate, self.scaling[adapter_name], task)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the layout of the base weight, float32 at least.

        Raises:
            ExportError: The update is not one matrix.
        """
        return self._delta(adapter_name, self._task_to_merge(adapter_name))

    def _delta(self, adapter_name: str, task: int | None) -> Tensor:
        A, B = self.factors(adapter_name, task=task)
        return (B @ A).t() if isinstance(self.get_base_layer(), Conv1D) else B @ A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is one matrix (peft asks before ``convert_to_lora``)."""
        return self.method_of(adapter_name).merges() == "exactly"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the base weight; ``safe_merge`` checks that the result is finite first."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.configs:
                continue
            task = self._task_to_merge(name)
            delta = self._delta(name, task)
            weight = self.get_base_weight()
            merged = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ExportError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)
            self._merged_tasks[name] = task

    def unmerge(self) -> None:
        """Take the merged ΔW off again (in low precision up to rounding, as with peft's LoRA)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            delta = self._delta(name, self._merged_tasks.pop(name))
            weight = self.get_base_weight()
            self.set_base_weight((weight.to(delta.dtype) - delta.to(weight.device)).to(weight.dtype))

    def extra_repr(self) -> str:
        """Which quantised kind of layer this adapts, if any, for ``print(model)``."""
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={type(backend).__name__}"

    def __repr__(self) -> str:
        return f"{self.method.name}." + super().__repr__()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Branches are computed in the dtype the base layer computes in: autocast's where it is on, else the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


@cache
def layer_class(method: Method) -> type[BranchLinear]:
    """The layer class of a method. Its name ends in "Linear": peft's ``all-linear`` knows adapted layers by that."""
    stem = prefix(method.name)
    names = {
        "method": method,
        "adapter_layer_names": tuple(f"{stem}{part}" for part in method.parameter_names()),
        "other_param_names": ("configs", "plans", "ranks", "scaling", *(f"{stem}{part}" for part in OFFSET)),
        "__doc__": f"A frozen linear layer with {method.name} branches.",
        "__module__": __name__,
    }
    return type(f"{method.config.__name__.removesuffix('Config')}Linear", (BranchLinear,), names)


def __getattr__(name: str) -> type:
    return class_of(name, "Linear", layer_class)
