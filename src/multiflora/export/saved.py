"""A multi-branch adapter on disk, read layer by layer without its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multiflora.adapter_tensors import OFFSET, method_of, rank_and_alpha
from multiflora.errors import ExportError
from multiflora.export.plain import ROOT, WEIGHTS, read_config
from multiflora.methods import METHODS
from multiflora.tensor_file import TensorFile

if TYPE_CHECKING:
    from multiflora.methods.base import Method

__all__ = ["Layer", "SavedAdapter", "method_of", "open_adapter", "rank_and_alpha"]


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its tensors by their names in the equation."""

    name: str
    """Its name in the base model."""
    config: Any
    """The adapter's, as this layer reads it."""
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
            ExportError: A tensor has gone since the adapter was opened.
        """
        with TensorFile(self.folder / WEIGHTS, ExportError) as file:
            held = set(file.names)
            for name in self.names:
                yield self._layer(file, held, name)

    def _layer(self, file: TensorFile, held: set[str], name: str) -> Layer:
        stem = f"{ROOT}{name}.{_prefix(self.method)}"
        wanted = (*self.method.parameter_names(), *(OFFSET if self.method.offset(self.config) else ()))
        shared = self.method.shared(self.config)
        parts = {part: file[stem + part] for part in wanted if part not in shared}
        group = self.method.group(self.config, name)
        for part in shared:  # one layer of the group holds them for all
            end = f".{_prefix(self.method)}{part}"
            parts[part] = file[
                next(
                    (
                        key
                        for key in sorted(held)
                        if key.endswith(end)
                        and self.method.group(self.config, key.removeprefix(ROOT).removesuffix(end)) == group
                    ),
                    stem + part,
                )
            ]
        r, alpha = rank_and_alpha(self.config, name)
        config = self.config.at(name)
        return Layer(name, config, parts, self.method.rank(config, r), self.method.scaling(config, r, alpha))

    def extras(self) -> dict[str, Tensor]:
        """The tensors outside the branches, by their full names."""
        with TensorFile(self.folder / WEIGHTS, ExportError) as file:
            return {name: file[name] for name in self.others}


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
    if config.target_parameters:
        raise ExportError(
            f"{folder} has branches on the fused experts of a mixture ({', '.join(config.target_parameters)}), and "
            "plain LoRA is written of linear layers alone. Serve it as it is; or, where the method merges, merge it in "
            "Python: model.merge_and_unload().save_pretrained(FOLDER)."
        )
    mark = "." + _prefix(method)
    with TensorFile(folder / WEIGHTS, ExportError) as file:
        ours = [name for name in file.names if mark in name]
        layers = dict.fromkeys(name.rpartition(mark)[0].removeprefix(ROOT) for name in ours)
        others = tuple(name for name in file.names if mark not in name)
    return SavedAdapter(folder, config, method, tuple(layers), others)
