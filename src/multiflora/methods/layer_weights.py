"""The weights of one adapted layer, every adapter's, and what each forward pass asks of their configs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from multiflora.context import Routing
from multiflora.methods.base import Method, Parts
from multiflora.methods.config import AdapterConfig
from multiflora.methods.inference import Store, can_prepare
from multiflora.peft_bridge import BufferDict, layer_widths, prefix, quantization_backend

__all__ = ["OFFSET", "BranchWeights", "Plan", "layer_names"]

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
    """Tensors that one layer holds for several."""
    left_to_op: bool
    """Whether the packed op needs nobody between stems and heads."""
    looks_inside: bool
    """Whether something reads what the stems made, besides the heads."""
    of_block: bool
    """Whether the layers of a block share a gate; see :mod:`multiflora.methods.block_router`."""
    can_prepare: bool
    """Whether branches have a form for inference, see :mod:`multiflora.methods.inference`."""

    @classmethod
    def of(cls, config: AdapterConfig, method: Method, r: int) -> Plan:
        """Ask a config; `method` is the class's, or what the config spells out, and `r` the layer's."""
        return cls(
            config,
            method,
            method.heads(config),
            method.rank(config, r),
            method.needs_task(),
            method.shared(config),
            method.middle is None and method.gate.left_to_op(config) and "router" not in method.shared(config),
            method.middle is not None or method.gate.of_stem,
            "router" in method.shared(config),
            can_prepare(method, config),
        )


class BranchWeights(nn.Module, BaseTunerLayer):
    """A frozen layer, and beside it the tensors of its adapters."""

    method: Method

    def __init__(self, base_layer: nn.Module, routing: Routing, name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.name = name
        self.in_features, self.out_features = self._widths()
        self.quantization_backend = quantization_backend(self.get_base_layer(), quantization)
        self.configs: dict[str, AdapterConfig] = {}
        self.plans: dict[str, Plan] = {}
        self.ranks: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        # for adapters whose shared tensors another layer holds, that layer
        self.holders: dict[str, Any] = {}
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
        self._prepared = Store()

    def _widths(self) -> tuple[int, int]:
        return layer_widths(self.get_base_layer())

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor here, given that of one layer."""
        return shape

    def _each(self, adapter_name: str, parts: Parts) -> Iterator[Parts]:
        """The tensors layer by layer, as a method's functions take them: here there is one layer."""
        yield parts

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """What a method's function made of each of these, in one tensor."""
        return tensors[0]

    def method_of(self, adapter_name: str) -> Method:
        """What the adapter is: the class's method, or what the adapter's config spells out."""
        return self.plan(adapter_name).method

    def plan(self, adapter_name: str) -> Plan:
        """What forward passes need to know of an adapter's config."""
        found = self.plans.get(adapter_name)
        if found is None:
            config = self.configs[adapter_name]
            found = self.plans[adapter_name] = Plan.of(config, self.method.of(config), self.ranks[adapter_name])
        return found

    def __getstate__(self) -> dict[str, Any]:
        # a method holds functions, which cannot be pickled; a copy prepares its own tensors
        return self.__dict__ | {"plans": {}, "_prepared": Store()}

    def train(self, mode: bool = True) -> BranchWeights:
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
        holder = self.holders.get(adapter_name)
        if holder is not None:
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
        holder = self.holders.get(adapter_name)
        if holder is not None:
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
        config = config.at(self.name)
        method = self.method.of(config)
        self.configs[adapter_name] = config
        self.ranks[adapter_name] = r
        self.plans.pop(adapter_name, None)
        self.scaling[adapter_name] = method.scaling(config, r, alpha)
        if frozen := tuple(self._attribute(part) for part in method.frozen(config)):
            # a new mapping: peft's is one for all layers until a layer has its own
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        self.holders.pop(adapter_name, None)
        holder: Any = self
        if method.shared(config):
            held = self.routing.holders.setdefault(adapter_name, {})
            holder = held.setdefault(method.group(config, self.name), self)
        if holder is not self:
            self.holders[adapter_name] = holder
        for part, shape in method.shapes(config, r, self.in_features, self.out_features).items():
            if part not in method.shared(config):
                self._weights(part)[adapter_name] = nn.Parameter(torch.empty(self._shape(shape)))
            elif holder is self:
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
        for each in self._each(adapter_name, parts):
            method.fill(config, each, generator)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if method.offset(config):
            # taken after the move: the offset has to be that of the weights as they are stored
            started = self.parts(adapter_name)
            mean = self._joined([method.mean_head(config, each) for each in self._each(adapter_name, started)])
            offset = {"A0": started["A"].detach().clone(), "B0": mean.clone()}
            for part, value in offset.items():
                # with low_cpu_mem_usage weights stay without data until a file brings them; peft spares parameters
                # from moving meanwhile, but not buffers, so these are given data at once
                kept = torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value
                self._weights(part)[adapter_name] = kept
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The adapter's update here as a plain LoRA, A' (k, d_in) and B' (d_out, k); see ``Method.factors``.

        Args:
            adapter_name: Which adapter.
            gate: Weight of each head, (H,); None asks the method, which must not read the input.
            task: Index of the task, for methods gated by task.
        """
        config, method, scale = self.configs[adapter_name], self.method_of(adapter_name), self.scaling[adapter_name]
        pairs = []
        for parts in self._each(adapter_name, self.parts(adapter_name)):
            weights = method.static_gate(config, parts, task) if gate is None else gate
            pairs.append(method.factors(config, parts, weights, scale, task))
        return self._joined([A for A, _ in pairs]), self._joined([B for _, B in pairs])

    def extra_repr(self) -> str:
        """Which quantised kind of layer this adapts, if any, for ``print(model)``."""
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={type(backend).__name__}"

    def __repr__(self) -> str:
        return f"{self.method.name}." + super().__repr__()


def layer_names(method: Method) -> dict[str, Any]:
    """What the class of a method's layers holds: the method, and in which attributes peft finds its tensors."""
    stem = prefix(method.name)
    return {
        "method": method,
        "adapter_layer_names": tuple(f"{stem}{part}" for part in method.parameter_names()),
        "other_param_names": (
            *("configs", "plans", "ranks", "scaling", "holders", "lora_dropout", "head_dropout"),
            *(f"{stem}{part}" for part in OFFSET),
        ),
    }
