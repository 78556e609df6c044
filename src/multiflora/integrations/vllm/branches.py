"""An adapter's branches beside vLLM's linear layers.

vLLM computes several linear layers of a model as one (q, k and v; gate and up). Each layer of the adapter then adds to
its own slice of the output. The branches hang on vLLM's layer as a hook, so the layer, its name and how its weights are
loaded stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.utils import get_packed_modules_mapping

from multiflora import ops
from multiflora.adapter_tensors import rank_and_alpha
from multiflora.errors import AdapterError
from multiflora.export.saved import SavedAdapter
from multiflora.methods.inference import prepare
from multiflora.methods.layer_weights import Plan

__all__ = ["Branches", "Place", "attach", "places"]

_OURS = "multiflora_branches"


class Place(NamedTuple):
    """Where a linear layer of the base model is in vLLM: some of a layer's outputs."""

    layer: Any
    start: int
    stop: int


class Branches(nn.Module):
    """The branches of all layers that vLLM computes as one."""

    def __init__(self) -> None:
        super().__init__()
        self.slices: list[tuple[int, int, ops.Prepared]] = []

    def add(self, place: Place, prepared: ops.Prepared) -> None:
        """Take the branches of one layer, which are added to its slice."""
        number, device = len(self.slices), next(place.layer.parameters()).device
        own = prepared._replace(rows=prepared.rows.to(device), columns=prepared.columns.to(device))
        # as buffers too, so that they are counted and moved with the model
        self.register_buffer(f"rows{number}", own.rows, persistent=False)
        self.register_buffer(f"columns{number}", own.columns, persistent=False)
        self.slices.append((place.start, place.stop, own))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y, (..., d_out), for its input x, with every branch added, in place."""
        for number, (start, stop, prepared) in enumerate(self.slices):
            rows, columns = self.get_buffer(f"rows{number}"), self.get_buffer(f"columns{number}")
            own = y[..., start:stop]
            own.copy_(ops.infer(x, prepared._replace(rows=rows, columns=columns), y=own))
        return y


def attach(model: nn.Module, adapter: SavedAdapter, task: int | None, dtype: torch.dtype) -> None:
    """Put an adapter's branches beside the layers of a model that vLLM has made.

    Args:
        model: vLLM's model, with or without its weights.
        adapter: The adapter.
        task: Index of the task of all requests, for methods that need it.
        dtype: In which the model computes.

    Raises:
        AdapterError: The adapter does not fit the model, or its gate has no prepared form.
    """
    found, mapper = places(model), getattr(model, "hf_to_vllm_mapper", None)
    for layer in adapter.layers():
        name = layer.name
        if mapper is not None:  # rules may be about the names of weights
            name = str(mapper.get_rename_mapper().map_name(f"{name}.weight")).removesuffix(".weight")
        place = found.get(name)
        if place is None:
            raise AdapterError(
                f"{adapter.folder} adapts {layer.name}, which is no linear layer of vLLM's {type(model).__name__}. The "
                "adapter was trained on another model, or on a layer that vLLM computes otherwise: use "
                "`multiflora serve`."
            )
        told = (layer.parts["B"].shape[0], layer.parts["A"].shape[-1])
        sizes = (place.stop - place.start, place.layer.input_size)
        if told != sizes:
            raise AdapterError(
                f"{adapter.folder}: the branches of {layer.name} are for a layer of {told[0]} x {told[1]}, but that of "
                f"the base model is {sizes[0]} x {sizes[1]}. The adapter was trained on another model."
            )
        plan = Plan.of(layer.config, adapter.method, rank_and_alpha(adapter.config, layer.name)[0])
        made = prepare(plan, layer.parts, layer.scale, dtype, task) if plan.can_prepare else None
        if made is None:
            raise AdapterError(
                f"{adapter.folder} holds a {adapter.method.name} adapter that cannot be prepared for inference, which "
                "vLLM needs: its gate, or what stands between stems and heads, is no constant, no table of tasks "
                "and no softmax of a router on the layer's input. Use `multiflora serve`."
            )
        branches = getattr(place.layer, _OURS, None)
        if branches is None:
            branches = Branches()
            place.layer.add_module(_OURS, branches)
            place.layer.register_forward_hook(_add)
        branches.add(place, made[0])


def _add(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    """The hook: vLLM's layers return their output, alone or with a bias that somebody else adds."""
    y, *rest = output if isinstance(output, tuple) else (output,)
    y = getattr(layer, _OURS)(args[0], y)
    return (y, *rest) if isinstance(output, tuple) else y


def places(model: nn.Module) -> dict[str, Place]:
    """Every linear layer of the base model by its name, wherever vLLM computes it."""
    packed, found = get_packed_modules_mapping(model), dict[str, Place]()
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        above, _, own = name.rpartition(".")
        found[name] = Place(layer, 0, layer.output_size)
        parts, sizes = packed.get(own, []), getattr(layer, "output_sizes", [])
        if len(parts) > 1 and len(parts) == len(sizes):
            start = 0
            for part, size in zip(parts, sizes, strict=True):
                found[f"{above}.{part}" if above else part] = Place(layer, start, start + size)
                start += size
    return found
