"""The shell around one adapted linear layer: owns weights, picks the adapter, calls the pure functions.

One class per method is made by :func:`layer_class`; they differ in nothing but the method they hold and the names of
their parameters, which carry the method's peft prefix.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from multiflora import ops
from multiflora.context import Routing, Tokens, missing
from multiflora.errors import AdapterError, ExportError
from multiflora.methods.base import Loss, Method, Seen, class_of
from multiflora.methods.config import AdapterConfig
from multiflora.methods.inference import Kept, Store, can_prepare
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
    needs_task: bool
    shared: tuple[str, ...]
    """Tensors that the first adapted layer holds for all."""
    left_to_op: bool
    """Whether the packed op needs nobody between stems and heads."""
    can_prepare: bool
    """Whether branches have a form for inference, see :mod:`multiflora.methods.inference`."""


class Merged(NamedTuple):
    """What was added to the base weight: kept, so that the same is taken off again, whatever the adapter became."""

    task: int | None
    """The task that it is the update of, for methods with one for each."""
    A: Tensor
    B: Tensor


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
        # modules, as everybody else's: what switches a model's dropout off looks for these
        self.lora_dropout = nn.ModuleDict()
        self.head_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._merged: dict[str, Merged] = {}
        self._prepared = Store()

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
                method.needs_task(),
                method.shared(config),
                method.between is None and method.gate.left_to_op(config),
                can_prepare(method, config),
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        # a method holds functions, which cannot be pickled; a copy prepares its own tensors
        return self.__dict__ | {"plans": {}, "_prepared": Store()}

    def train(self, mode: bool = True) -> BranchLinear:
        """Training or not; what was prepared for inference gives its memory back."""
        if mode:
            self._prepared.clear()
        super().train(mode)
        return self

    def _attribute(self, part: str) -> str:
        return f"{prefix(self.method.name)}{part}"

    def _weights(self, part: str) -> Any:
        return getattr(self, self._attribute(part))

    def places(self, adapter_name: str) -> dict[str, Any]:
        """Where the adapter's tensors are held, by their names in the equation: part -> adapter -> tensor."""
        found = {part: self._weights(part)._parameters for part in self._trained}
        found |= {part: self._weights(part)._buffers for part in self._frozen}
        holder: Any = self.routing.holders.get(adapter_name)
        if holder is not None and holder is not self:
            found |= {part: holder._weights(part)._parameters for part in holder.plan(adapter_name).shared}
        return found

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
        holder: Any = self.routing.holders.get(adapter_name)
        if holder is not None and holder is not self:
            for part in holder.plan(adapter_name).shared:
                found[part] = holder._modules[holder._trained[part]]._parameters[adapter_name]
        return found

    def learns(self, adapter_name: str) -> bool:
        """Whether an adapter is in use here and being trained."""
        if self.disable_adapters or self.merged or adapter_name not in self.active_adapters:
            return False
        return any(part.requires_grad for part in self.parts(adapter_name).values())

    def has_learned(self, adapter_name: str) -> bool:
        """Whether an adapter with a stored offset has moved away from it: what it computes here is not its start."""
        parts = self.parts(adapter_name)
        return "A0" not in parts or any(
            bool((parts[part].to(parts[start].dtype) != parts[start]).any())
            for part, start in (("A", "A0"), ("B", "B0"))
        )

    def update_layer(self, adapter_name: str, config: AdapterConfig, r: int, alpha: float) -> None:
        """Add an adapter: make its tensors, fill them, put them beside the base weight."""
        method = self.method.of(config)
        self.configs[adapter_name] = config
        self.ranks[adapter_name] = r
        self.plans.pop(adapter_name, None)
        self.scaling[adapter_name] = method.scaling(config, r, alpha)
        holder = self.routing.holders.setdefault(adapter_name, self) if method.shared(config) else self
        for part, shape in method.shapes(config, r, self.in_features, self.out_features).items():
            if holder is self or part not in method.shared(config):
                self._weights(part)[adapter_name] = nn.Parameter(torch.empty(shape))
        for kind, p in (("lora_dropout", config.lora_dropout), ("head_dropout", method.head_dropout(config))):
            if p > 0:
                getattr(self, kind)[adapter_name] = nn.Dropout(p).train(self.training)
        generator = None
        if config.init_seed is not None:
            # each layer its own stream, the same whatever order layers are made in
            generator = torch.Generator().manual_seed(config.init_seed + zlib.crc32(self.name.encode()))
        parts = self.parts(adapter_name)
        if holder is not self:  # which has filled what all share
            parts |= {part: torch.empty_like(parts[part]) for part in method.shared(config)}
        method.fill(config, parts, generator)
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
        if not (args or kwargs or torch.is_grad_enabled()) and (inferred := self._infer(x)) is not None:
            return inferred
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            for name, merged in self._merged.items():
                self._check_merged_task(name, merged.task)
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
        if type(base) is not nn.Linear or torch.compiler.is_compiling() or self._loops():
            return False
        parameters: dict[str, Any] = base._parameters
        # neither is a parameter where pruning or weight norm computes it anew in each call
        weight: Any = parameters.get("weight")
        bias = parameters.get("bias")
        return (
            # a quantised or sharded weight is a Tensor subclass, whose Parameter has that subclass's type
            type(weight) in (nn.Parameter, Tensor)
            and weight.dtype == _compute_dtype(x) == x.dtype
            and not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and "bias" in parameters
            and "forward" not in base.__dict__
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        )

    def _loops(self) -> bool:
        """Whether to compute head by head: asked for, or inside a transform that only knows torch's own operations."""
        return self.routing.loop or (not torch.compiler.is_compiling() and _is_transformed())

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
        kept = self._prepared.get(self, plan, adapter_name, x, rows)
        if kept is not None:
            return ops.infer(x, kept.branches, base, y=y, gate=self._gate(kept, plan, x, rows, of))
        loss = self._loss(adapter_name, plan)
        tokens = self._tokens(plan, x, rows, of, loss)
        tasks = None if tokens is None else self._tasks(plan, tokens, x, rows)
        router, (A0, B0) = parts.get("router"), method.frozen_term(config, parts) or (None, None)
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
        stems = u
        if method.between is not None:
            matrices = method.between.matrices(parts)[tasks].to(u.dtype)
            u = (matrices @ u.t().unsqueeze(-1)).squeeze(-1).t().contiguous()
        gate = method.gate.weights(config, parts, logits, tasks)
        value = self._value(loss, plan, stems, gate, logits, tokens)
        self._record(gate, tasks, tokens)
        summed = ops.heads(
            place if y is None else y,  # type: ignore[arg-type]  # one of the two is there
            u,
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
        # each line is paid for by every layer for every token
        state = self.__dict__
        active = state["_active_adapter"]
        if state["_disable_adapters"] or state["merged_adapters"] or len(active) != 1 or type(active) is str:
            return None
        plan = state["plans"].get(active[0])
        if plan is None or not self._base_is_plain(x):
            return None
        kept = state["_prepared"].get(self, plan, active[0], x)
        if kept is None:
            return None
        base = state["_modules"]["base_layer"]._parameters
        return ops.infer(x, kept.branches, (x, base["weight"], base["bias"]), gate=self._gate(kept, plan, x))

    def _gate(
        self, kept: Kept, plan: Plan, x: Tensor, rows: Sequence[int] | None = None, of: int | None = None
    ) -> Tensor | None:
        """Weights of the heads where rows of several tasks are computed together, (T, H)."""
        if kept.table is None:
            return None
        tokens = self._tokens(plan, x, rows, of, None)
        assert tokens is not None
        return kept.table[self._tasks(plan, tokens, x, rows)]

    def _loop(
        self, x: Tensor, adapter_name: str, *, y: Tensor, rows: Sequence[int] | None = None, of: int | None = None
    ) -> Tensor:
        """The same, head by head."""
        plan, parts = self.plan(adapter_name), self.parts(adapter_name)
        config, method = plan.config, plan.method
        loss = self._loss(adapter_name, plan)
        tokens = self._tokens(plan, x, rows, of, loss)
        tasks = None if tokens is None else self._tasks(plan, tokens, x, rows)
        shape, x, y = y.shape, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        p, seed = self._dropout("lora_dropout", adapter_name)
        dropped = x * ops.dropout_mask(tuple(x.shape), p, seed, device=x.device, dtype=x.dtype) if p > 0 else x
        router = parts.get("router")
        logits = None if router is None else router.to(x.dtype) @ x.t()
        gate = method.gate.weights(config, parts, logits, tasks)
        scale = self.scaling[adapter_name]
        stems = (F.linear(dropped, parts["A"].to(x.dtype)) * scale).t()
        value = self._value(loss, plan, stems, gate, logits, tokens)
        self._record(gate, tasks, tokens)
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
            dropout=self._dropout("head_dropout", adapter_name),
        )
        frozen = method.frozen_term(config, parts)
        if frozen is not None:
            y = y - (F.linear(F.linear(x, frozen[0].to(x.dtype)), frozen[1].to(x.dtype)) * scale).to(y.dtype)
        y = y.view(shape)
        return y if value is None else self.routing.report(adapter_name, value, y)

    def _dropout(self, kind: str, adapter_name: str) -> ops.Dropout:
        """A mask's probability and a fresh seed; none outside training, nor where somebody switched the module off."""
        modules: Any = self._modules
        module: Any = modules[kind]._modules.get(adapter_name)
        if module is None or not module.training:
            return 0.0, 0
        p = getattr(module, "p", 0.0)
        return (p, ops.draw_seed()) if p > 0 else (0.0, 0)

    def _loss(self, adapter_name: str, plan: Plan) -> Loss | None:
        """What the method adds to the loss, where the config has it on now and the adapter is being trained."""
        loss = plan.method.loss
        if loss is None or not self.training or not loss.on(plan.config):
            return None
        return loss if any(part.requires_grad for part in self.parts(adapter_name).values()) else None

    def _tokens(
        self, plan: Plan, x: Tensor, rows: Sequence[int] | None, of: int | None, loss: Loss | None
    ) -> Tokens | None:
        """What is known of the input's tokens; None where nobody asks."""
        if not (plan.needs_task or loss is not None or self.routing.recorder is not None):
            return None
        # a mixed batch: what is known is known of the whole batch, of which these are some rows
        lead = x.shape[:-1] if rows is None or of is None else torch.Size([of, *x.shape[1:-1]])
        return self.routing.tokens(self.name, x, lead)

    def _tasks(self, plan: Plan, tokens: Tokens, x: Tensor, rows: Sequence[int] | None) -> Tensor | None:
        """The task of each token, (T,); None where it is neither known nor needed."""
        if not plan.needs_task and self.routing.recorder is None:
            return None
        tasks = tokens.tasks(plan.config, x.device, rows)
        if tasks is None and plan.needs_task:
            raise missing(plan.config)
        if tasks is not None and rows is not None:
            tasks = tasks.view(tokens.lead[0], -1)[list(rows)].reshape(-1)
        return tasks

    def _value(
        self,
        loss: Loss | None,
        plan: Plan,
        stems: Tensor,
        gate: Tensor | None,
        logits: Tensor | None,
        tokens: Tokens | None,
    ) -> Tensor | None:
        """What the layer adds to the loss, or None."""
        if loss is None or tokens is None:
            return None
        return loss.value(plan.config, Seen(stems, gate, logits, tokens))

    def _record(self, gate: Tensor | None, tasks: Tensor | None, tokens: Tokens | None) -> None:
        recorder = self.routing.recorder
        if gate is not None and tokens is not None and recorder is not None:
            with self.routing.reporting(tokens):
                recorder(self.name, gate.detach().t(), tasks)

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
        return self._delta(*self.factors(adapter_name, task=self._task_to_merge(adapter_name)))

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).t() if isinstance(self.get_base_layer(), Conv1D) else B @ A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is one matrix (peft asks before ``convert_to_lora``)."""
        return self.method_of(adapter_name).merges() == "exactly"

    def updates(self, adapter_names: list[str] | None = None, *, safe_merge: bool = False) -> dict[str, Merged]:
        """What a merge would add to the base weight, by adapter; those that are merged already are left out.

        Args:
            adapter_names: Which adapters; None: the active ones.
            safe_merge: Refuse an update that would make the weight infinite or NaN.

        Raises:
            ExportError: The merged layer would not equal the unmerged one. Nothing has been changed.
        """
        base, backend = self.get_base_layer(), self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ExportError(
                f"Cannot merge into {self.name}: {backend.backend_name} weights cannot be read back and written. "
                "Keep the adapter beside the quantised model, or merge into the unquantised one."
            )
        found: dict[str, Merged] = {}
        weight = self.get_base_weight() if safe_merge else None
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.configs:
                continue
            task = self._task_to_merge(name)
            # copies: a factor may be the parameter itself, which training changes in place
            update = Merged(task, *(factor.detach().clone() for factor in self.factors(name, task=task)))
            merged = self._merged.get(name)
            if merged is not None:
                if merged.task != task:
                    raise ExportError(
                        f"The adapter {name} is already merged into {self.name}, for "
                        f"{self._task_name(name, merged.task)}; call unmerge_adapter() before it is merged for "
                        f"{self._task_name(name, task)}."
                    )
                continue
            if weight is not None:
                weight = self._added(update, weight)
                if not torch.isfinite(weight).all():
                    raise ExportError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            found[name] = update
        if found and backend is None and base._parameters.get("weight") is None:
            raise ExportError(
                f"Cannot merge into {self.name}: its weight is computed anew in each forward pass (pruned, or "
                "parametrised), so what is added to it would be lost. Make it a plain weight first, with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
        return found

    def _added(self, update: Merged, weight: Tensor, sign: int = 1) -> Tensor:
        """A base weight with an update added or taken off, rounded once."""
        delta = self._delta(update.A, update.B)
        return (weight.to(delta.dtype) + sign * delta.to(weight.device)).to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the base weight; ``safe_merge`` checks that the result is finite first.

        Raises:
            ExportError: See `updates`; nothing has been changed.
        """
        wanted = check_adapters_to_merge(self, adapter_names)  # which says what is merged already
        for name, update in self.updates(adapter_names, safe_merge=safe_merge).items():
            if name in wanted:
                self.set_base_weight(self._added(update, self.get_base_weight()))
                self.merged_adapters.append(name)
                self._merged[name] = update

    def unmerge(self) -> None:
        """Take the merged ΔW off again (in low precision up to rounding, as with peft's LoRA)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            update = self._merged.pop(self.merged_adapters.pop())
            self.set_base_weight(self._added(update, self.get_base_weight(), -1))

    def _task_name(self, adapter_name: str, task: int | None) -> str:
        names = self.configs[adapter_name].task_names
        return f"the task {names[task]!r}" if names and task is not None else f"task {task}"

    def _check_merged_task(self, adapter_name: str, merged: int | None) -> None:
        """Refuse rows of another task than the one whose weight is in the base now."""
        if merged is None:
            return
        tasks = self.routing.now().ids_for(self.configs[adapter_name])
        if tasks is None:
            return
        message = (
            f"The adapter {adapter_name} is merged for {self._task_name(adapter_name, merged)}, and the batch has rows "
            "of another task. Call unmerge_adapter() first, or leave the task out."
        )
        same = (tasks == merged).all()
        if torch.compiler.is_compiling():
            torch._assert_async(same, message)  # no Python branch: it would break the graph
        elif not same:
            raise AdapterError(message)

    def extra_repr(self) -> str:
        """Which quantised kind of layer this adapts, if any, for ``print(model)``."""
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={type(backend).__name__}"

    def __repr__(self) -> str:
        return f"{self.method.name}." + super().__repr__()


def _is_transformed() -> bool:
    """Inside torch.func, forward-mode differentiation or torch.jit.trace: to these the packed op is opaque."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
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
    stem = prefix(method.name)
    names = {
        "method": method,
        "adapter_layer_names": tuple(f"{stem}{part}" for part in method.parameter_names()),
        "other_param_names": (
            *("configs", "plans", "ranks", "scaling", "lora_dropout", "head_dropout"),
            *(f"{stem}{part}" for part in OFFSET),
        ),
        "__doc__": f"A frozen linear layer with {method.name} branches.",
        "__module__": __name__,
    }
    return type(f"{method.config.__name__.removesuffix('Config')}Linear", (BranchLinear,), names)


def __getattr__(name: str) -> type:
    return class_of(name, "Linear", layer_class)
