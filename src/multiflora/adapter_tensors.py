"""An adapter's tensors against its config and its base model: what is wrong with them, a sentence each.

Names and shapes are read from the file's header, so that a lie is found before memory is taken for it; the numbers come
last, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multiflora.errors import ConfigError
from multiflora.methods import METHODS
from multiflora.tensor_file import TensorFile

if TYPE_CHECKING:
    from multiflora.methods.base import Method

__all__ = [
    "CONFIG",
    "OFFSET",
    "ROOT",
    "is_fused",
    "is_lora",
    "method_of",
    "misfits",
    "rank_and_alpha",
    "state_problems",
    "tensor_problems",
]

CONFIG = "adapter_config.json"
ROOT = "base_model.model."
"""What peft puts before the name of every module."""
OFFSET = ("A0", "B0")
_NUMBERS = ("F64", "F32", "F16", "BF16")
_DTYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


def method_of(config: Any) -> Method | None:
    """Our method behind a peft config, or None for others' configs."""
    card = METHODS.get(getattr(config, "method_name", ""))
    if card is None or card.module is None:
        return None
    method: Method = import_module(card.module).METHOD
    return method.of(config)


def rank_and_alpha(config: Any, name: str) -> tuple[int, float]:
    """r and alpha of a layer, with the patterns of the config."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}  # a file may say null
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return int(r), float(alpha)


def is_fused(config: Any, name: str) -> bool:
    """Whether an adapted layer is a fused parameter of a mixture's experts, with tensors for each of them."""
    endings = getattr(config, "target_parameters", None) or ()
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def is_lora(config: Any) -> bool:
    """Whether it is peft's own LoRA, in any of its forms."""
    return bool(getattr(config.peft_type, "value", config.peft_type) == "LORA")


def tensor_problems(config: Any, file: TensorFile) -> Iterator[str]:
    """What is wrong with the tensors: first what their names and shapes tell, then their numbers."""
    if not file.names:
        yield "it holds no tensor at all; nothing was saved. Save the adapter again."
    for name in file.names:
        if 0 in file.shape(name) and not _is_pruned(config, name):
            yield (
                f"tensor {name} is empty (shape {file.shape(name)}); a shard was saved instead of the whole. Save "
                "again from a process that holds all weights."
            )
        if file.dtype(name) not in _NUMBERS:
            yield f"tensor {name} is of type {file.dtype(name)}; expected one of {', '.join(_NUMBERS)}. Save it again."
    largest = max((size for name in file.names for size in file.shape(name)), default=0)
    ranks = {"r": getattr(config, "r", None), **(getattr(config, "rank_pattern", None) or {})}
    for key, rank in ranks.items():
        if not isinstance(rank, int):
            continue  # AdaLoRA writes masks there, prompt tuning nothing
        if rank > largest:
            yield f"{CONFIG} says {key} = {rank:,}, but no tensor is that large (the largest is {largest:,})."
    method = method_of(config)
    if method is not None:
        yield from _branch_problems(method, config, file)
    elif is_lora(config):
        yield from _lora_problems(config, file)
    for name in file.names:
        if 0 in file.shape(name):
            continue
        yield from _number_problems(name, file[name])


def _number_problems(name: str, tensor: Tensor) -> Iterator[str]:
    # NaN passes through minimum and maximum; this reads a tensor once and makes no copy
    if not all(map(torch.isfinite, tensor.aminmax())):
        yield f"tensor {name} holds NaN or infinity; the adapter was broken in training. Train or fetch it again."


def state_problems(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with tensors that are about to be loaded into a model, a sentence each.

    Args:
        wanted: The adapter's tensors as they are in the model, by name: all of them must come.
        state: What is to be loaded, under the same names; other modules' tensors may come along.
    """
    from multiflora.peft_bridge import STEM

    missing = sorted(wanted.keys() - state.keys())
    if missing:
        yield (
            f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are); it would be left at its random "
            "start. Save the adapter again."
        )
    strange = sorted(name for name in state.keys() - wanted.keys() if f".{STEM}" in name or ".lora_" in name)
    if strange:
        yield (
            f"tensor {strange[0]} has no place in this model with this adapter ({len(strange)} have none). It belongs "
            "to another adapter or model."
        )
    for name, tensor in state.items():
        place = wanted.get(name)
        # of weights that are spread over processes a process may hold nothing
        if place is not None and place.numel() and place.shape != tensor.shape:
            yield f"tensor {name} has shape {tuple(tensor.shape)}; expected {tuple(place.shape)}. Save it again."
        if place is not None and str(tensor.dtype) not in _DTYPES:
            yield f"tensor {name} is of type {tensor.dtype}; expected one of {', '.join(_DTYPES)}. Save it again."
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            yield from _number_problems(name, tensor)


def _is_pruned(config: Any, name: str) -> bool:
    """Whether AdaLoRA has left a layer no direction at all, as its masks tell."""
    masks = getattr(config, "rank_pattern", None) or {}
    if getattr(config.peft_type, "value", config.peft_type) != "ADALORA":
        return False
    layer = name.removeprefix(ROOT).rpartition(".lora_")[0]
    return any(key.startswith(f"{layer}.lora_") and not any(mask) for key, mask in masks.items())


@dataclass(frozen=True)
class _Found:
    """The tensors of one adapted layer."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]


def _layers(file: TensorFile, mark: str) -> Iterator[_Found]:
    """Group the tensors whose names have ``mark`` by the layer they belong to."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in file.names:
        layer, marked, part = name.rpartition(mark)
        if marked:
            found.setdefault(layer.removeprefix(ROOT), {})[part] = file.shape(name)
    return (_Found(name, shapes) for name, shapes in found.items())


def _branch_problems(method: Method, config: Any, file: TensorFile) -> Iterator[str]:
    from multiflora.peft_bridge import STEM, prefix

    mark = "." + prefix(method.name)
    layers = list(_layers(file, mark))
    foreign = [name for name in file.names if (f".{STEM}" in name and mark not in name) or ".lora_" in name]
    if foreign:
        yield f"tensor {foreign[0]} belongs to another method; {CONFIG} says {method.name}. The two files do not match."
    if not layers:
        yield f"it holds no tensor of {method.name} (expected names with {mark}). Save the adapter again."
    every = {*method.parameter_names(), *(OFFSET if method.offset(config) else ())}
    shared = set(method.shared(config))
    holders: dict[str, str] = {}  # one layer of each group holds for all what they share
    for layer in sorted(layers, key=lambda layer: not shared & layer.shapes.keys()):
        holders.setdefault(method.group(config, layer.name), layer.name)
    for layer in layers:
        wanted = every if holders[method.group(config, layer.name)] == layer.name else every - shared
        stem = f"{ROOT}{layer.name}{mark}"
        for part in sorted(wanted - layer.shapes.keys()):
            yield f"tensor {stem}{part} is missing; the file is incomplete. Save the adapter again."
        for part in sorted(layer.shapes.keys() - wanted):
            yield f"tensor {stem}{part} is not one of {method.name}'s ({', '.join(sorted(wanted))})."
        try:
            own = config.at(layer.name)
        except ConfigError as problem:
            yield str(problem)
            continue
        r, _ = rank_and_alpha(config, layer.name)
        A, B = layer.shapes["A"], layer.shapes["B"]
        axes = 3 if is_fused(config, layer.name) else 2
        if len(A) != axes or len(B) != axes:
            what = "a matrix for each expert" if axes == 3 else "matrices"
            yield f"tensors {stem}A and B have shapes {A} and {B}; expected {what}. Save the adapter again."
        shapes = method.shapes(own, r, A[-1], B[-2])
        rank = method.offset_rank(own, r)
        shapes |= {"A0": (rank, A[-1]), "B0": (B[-2], rank)} if rank else {}
        for part, alone in shapes.items():
            shape = alone if part in shared else (*A[:-2], *alone)
            if part in wanted and layer.shapes[part] != shape:
                yield (
                    f"tensor {stem}{part} has shape {layer.shapes[part]}, but the config asks for {shape}. Weights and "
                    f"{CONFIG} do not belong together, or only a shard was saved."
                )


def _lora_problems(config: Any, file: TensorFile) -> Iterator[str]:
    from multiflora.peft_bridge import STEM

    foreign = [name for name in file.names if f".{STEM}" in name]
    if foreign:
        yield f"tensor {foreign[0]} belongs to another method; {CONFIG} says LORA. The two files do not match."
    pairs = [layer for layer in _layers(file, ".lora_") if layer.shapes.keys() & {"A.weight", "B.weight"}]
    for layer in pairs:
        stem = f"{ROOT}{layer.name}.lora_"
        for part in ("A.weight", "B.weight"):
            if part not in layer.shapes:
                yield f"tensor {stem}{part} is missing; the file is incomplete. Save the adapter again."
        r, _ = rank_and_alpha(config, layer.name)
        A, B = layer.shapes["A.weight"], layer.shapes["B.weight"]
        if len(A) < 2 or len(B) < 2:
            yield f"tensors {stem}A.weight and B.weight have shapes {A} and {B}; expected matrices. Save it again."
        # of a fused parameter peft keeps the experts' ranks one under another, and does not say so in the name
        several = bool(getattr(config, "target_parameters", None))
        for part, size in (("A.weight", A[0]), ("B.weight", B[1])):
            if size % r if several else size != r:
                yield (
                    f"tensor {stem}{part} has shape {layer.shapes[part]}, but the config asks for rank {r}. Weights "
                    f"and {CONFIG} do not belong together, or only a shard was saved."
                )


def misfits(config: Any, file: TensorFile, base: Any) -> Iterator[str]:
    """Which adapted layers the base model does not have, or has in another size."""
    from multiflora.methods.experts import FusedWeight
    from multiflora.methods.fused import targeted, why_not
    from multiflora.peft_bridge import prefix

    method = method_of(config)
    if method is None and not is_lora(config):
        return
    mark, ends = (".lora_", ("A.weight", "B.weight")) if method is None else (f".{prefix(method.name)}", ("A", "B"))
    modules: dict[str, Any] = dict(base.named_modules())
    if method is not None and getattr(config, "target_parameters", None):
        fused = targeted(base, config.target_parameters).items()
        modules |= {name: FusedWeight(experts, own) for name, (experts, own) in fused if not why_not(experts, own)}
    for layer in _layers(file, mark):
        if not set(ends) <= layer.shapes.keys():
            continue  # an embedding's pair, which peft itself fits
        name = layer.name.replace(".base_layer", "")  # in which peft hides a second parameter of the same module
        if name not in modules:
            yield (
                f"tensor {ROOT}{layer.name}{mark}{ends[0]}: the base model has no layer {layer.name}. The adapter was "
                "trained on another model."
            )
            return
        module = modules[name]
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        A, B = layer.shapes[ends[0]], layer.shapes[ends[1]]
        told = (A[-1], B[0] if len(B) < 3 else B[-2])
        for part, size, says in zip(ends, sizes, told, strict=True):
            if isinstance(size, int) and size != says:
                yield (
                    f"tensor {ROOT}{layer.name}{mark}{part} has shape {layer.shapes[part]}, but that layer of the base "
                    f"model is {sizes[1]} x {sizes[0]}. The adapter was trained on another model."
                )
