"""A multi-branch adapter on disk, read layer by layer without its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multiflora.errors import ExportError
from multiflora.export.plain import ROOT, WEIGHTS, read_config
from multiflora.export.tensors import TensorFile
from multiflora.methods import METHODS

if TYPE_CHECKING:
    from multiflora.methods.base import Method

__all__ = ["Layer", "SavedAdapter", "method_of", "open_adapter", "rank_and_alpha"]

OFFSET = ("A0", "B0")


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its tensors by their names in the equation."""

    name: str
    """Its name in the base model."""
    parts: Mapping[str, Tensor]
    rank: int
    """Of a branch."""
    scale: float
    """The factor s."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter of one of our methods in a folder; see `open_adapter`."""

    folder: Path
    config: Any
    method: Method
    names: tuple[str, ...]
    """The adapted layers' names in the base model."""
    others: tuple[str, ...]
    """Tensors outside the branches: biases, modules saved in full."""

    def layers(self) -> Iterator[Layer]:
        """Every adapted layer, read when it is asked for.

        Raises:
            ExportError: A tensor is missing, empty or of another shape than the config says.
        """
        with TensorFile(self.folder / WEIGHTS) as file:
            held = set(file.names)
            for name in self.names:
                yield self._layer(file, held, name)

    def _layer(self, file: TensorFile, held: set[str], name: str) -> Layer:
        stem = f"{ROOT}{name}.{_prefix(self.method)}"
        wanted = (*self.method.parameter_names(), *(OFFSET if self.method.offset(self.config) else ()))
        parts = {part: file[stem + part] for part in wanted}
        r, alpha = rank_and_alpha(self.config, name)
        shapes = self.method.shapes(self.config, r, parts["A"].shape[-1], parts["B"].shape[0])
        for part, shape in shapes.items():
            if tuple(parts[part].shape) != shape:
                raise ExportError(
                    f"{file.path}: tensor {stem}{part} has shape {tuple(parts[part].shape)}, but the config asks for "
                    f"{shape}. Weights and adapter_config.json do not belong together, or only a shard was saved."
                )
        return Layer(name, parts, self.method.rank(self.config, r), self.method.scaling(self.config, r, alpha))

    def extras(self) -> dict[str, Tensor]:
        """The tensors outside the branches, by their full names."""
        with TensorFile(self.folder / WEIGHTS) as file:
            return {name: file[name] for name in self.others}


def method_of(config: Any) -> Method | None:
    """Our method behind a peft config, or None for others' configs."""
    name = getattr(config, "method_name", "")
    card = METHODS.get(name)
    if card is None or card.module is None:
        return None
    method: Method = import_module(card.module).METHOD
    return method.of(config)


def _prefix(method: Method) -> str:
    from multiflora.peft_bridge import prefix

    return prefix(method.name)


def open_adapter(folder: Path) -> SavedAdapter:
    """Open an adapter of one of our methods; no weight is read yet.

    Raises:
        ExportError: It is none of ours, or its weights are not in safetensors, or a file is damaged.
    """
    config = read_config(folder)
    method = method_of(config)
    if method is None:
        raise ExportError(
            f"{folder} holds an adapter of kind {getattr(config.peft_type, 'value', config.peft_type)}; expected one "
            f"of {', '.join(name for name, card in METHODS.items() if card.module)}."
        )
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise ExportError(
            f"{folder} holds adapter_model.bin, which can carry code; expected {WEIGHTS}. Load it with peft and save "
            "it with safe_serialization=True."
        )
    mark = "." + _prefix(method)
    with TensorFile(folder / WEIGHTS) as file:
        ours = [name for name in file.names if mark in name]
        layers = dict.fromkeys(name.rpartition(mark)[0].removeprefix(ROOT) for name in ours)
        others = tuple(name for name in file.names if mark not in name)
    if not layers:
        raise ExportError(
            f"{folder / WEIGHTS} holds no tensor of {method.name} (expected names with {mark}); nothing was saved, or "
            "only a shard. Save the adapter again."
        )
    return SavedAdapter(folder, config, method, tuple(layers), others)


def rank_and_alpha(config: Any, name: str) -> tuple[int, float]:
    """r and alpha of a layer, with the patterns of the config."""
    from peft.utils.other import get_pattern_key

    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    return int(r), float(alpha)
