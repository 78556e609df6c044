"""An adapter's branches beside vLLM's linear layers.

vLLM computes several linear layers of a model as one (q, k and v; gate and up). Each layer of the adapter then adds to
its own slice of the output. The branches hang on vLLM's layer as a hook, so the layer, its name and how its weights are
loaded stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

__all__ = ["Branches", "Place", "Slice", "add", "attach", "places", "slices_of"]

_OURS = "multiflora_branches"


class Place(NamedTuple):
    """Where a linear layer of the base model is in vLLM: some of a layer's outputs."""

    name: str
    """vLLM's layer, by its name there."""
    layer: Any
    start: int
    stop: int


class Slice(NamedTuple):
    """One layer's branches, and the outputs of vLLM's layer that they are added to."""

    start: int
    stop: int
    prepared: ops.Prepared


def add(slices: Iterable[Slice], x: Tensor, y: Tensor) -> None:
    """Add branches to a layer's output y, (..., d_out), for its input x, in place."""
    for start, stop, prepared in slices:
        own = y[..., start:stop]
        own.copy_(ops.infer(x, prepared, y=own))


class Branches(nn.Module):
    """The branches of all layers that vLLM computes as one."""

    def __init__(self) -> None:
        super().__init__()
        self.slices: list[Slice] = []

    def add(self, one: Slice) -> None:
        """Take the branches of one layer."""
        # as buffers too, so that they are counted and moved with the model
        self.register_buffer(f"rows{len(self.slices)}", one.prepared.rows, persistent=False)
        self.register_buffer(f"columns{len(self.slices)}", one.prepared.columns, persistent=False)
        self.slices.append(one)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y, (..., d_out), for its input x, with every branch added, in place."""
        for number, (start, stop, prepared) in enumerate(self.slices):
            rows, columns = self.get_buffer(f"rows{number}"), self.get_buffer(f"columns{number}")
            add([Slice(start, stop, prepared._replace(rows=rows, columns=columns))], x, y)
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
    found = places(dict(model.named_modules()), get_packed_modules_mapping(model))
    for place, one in slices_of(adapter, task, model, found, dtype):
        branches = getattr(place.layer, _OURS, None)
        if branches is None:
            branches = Branches()
            place.layer.add_module(_OURS, branches)
            place.layer.register_forward_hook(_add)
        branches.add(one)


def slices_of(
    adapter: SavedAdapter, task: int | None, model: nn.Module, found: Mapping[str, Place], dtype: torch.dtype
) -> Iterator[tuple[Place, Slice]]:
    """An adapter's branches as they are multiplied, layer by layer, each with where it belongs.

    Args:
        adapter: The adapter.
        task: Index of its task, for methods that need it.
        model: vLLM's model.
        found: Its linear layers, see `places`.
        dtype: In which the model computes.

    Raises:
        AdapterError: The adapter does not fit the model, or its gate has no prepared form.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
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
        prepared, device = made[0], next(place.layer.parameters()).device
        prepared = prepared._replace(rows=prepared.rows.to(device), columns=prepared.columns.to(device))
        yield place, Slice(place.start, place.stop, prepared)


def _add(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    """The hook: vLLM's layers return their output, alone or with a bias that somebody else adds."""
    y, *rest = output if isinstance(output, tuple) else (output,)
    y = getattr(layer, _OURS)(args[0], y)
    return (y, *rest) if isinstance(output, tuple) else y


def places(modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> dict[str, Place]:
    """Every linear layer of the base model by its name, wherever vLLM computes it.

    Args:
        modules: vLLM's layers by name; those that are not linear are passed over.
        packed: Which layers it computes as one: the last part of its name -> those of theirs.
    """
    found: dict[str, Place] = {}
    for name, layer in modules.items():
        if not isinstance(layer, LinearBase):
            continue
        above, _, own = name.rpartition(".")
        found[name] = Place(name, layer, 0, layer.output_size)
        parts, sizes = packed.get(own, []), getattr(layer, "output_sizes", [])
        if len(parts) > 1 and len(parts) == len(sizes):
            start = 0
            for part, size in zip(parts, sizes, strict=True):
                found[f"{above}.{part}" if above else part] = Place(name, layer, start, start + size)
                start += size
    return found
