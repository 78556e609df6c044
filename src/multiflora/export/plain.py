"""A plain LoRA adapter, as stock peft and every server read it: one pair (A, B) for each adapted layer.

It is written with alpha equal to r, in every layer, so that the scale is 1 and stands inside B. Servers and their
versions differ in what they make of ``alpha_pattern``, ``rank_pattern`` and ``use_rslora``; a scale of 1 is read the
same by all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiflora.adapter_folder import WEIGHTS, check_adapter
from multiflora.adapter_tensors import CONFIG, ROOT, rank_and_alpha
from multiflora.errors import ExportError
from multiflora.files import saving
from multiflora.tensor_file import TensorFile, write_tensors

__all__ = ["CONFIG", "KEPT", "ROOT", "WEIGHTS", "Pair", "PlainLora", "read_config", "read_lora", "write_lora"]

KEPT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "trainable_token_indices",
)
"""Settings that mean the same in every peft config: which modules, which base."""


class Pair(NamedTuple):
    """The update of one layer, ΔW = B A; the scale is inside B."""

    name: str
    """The layer's name in the base model."""
    A: Tensor
    """(k, d_in)."""
    B: Tensor
    """(d_out, k)."""


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA on disk; see `read_lora`."""

    folder: Path
    config: Any
    """Its ``peft.LoraConfig``."""
    layers: Mapping[str, float]
    """Scale of each adapted layer, by name."""
    others: Sequence[str] = field(default=())
    """Tensors that belong to no layer's pair: biases, modules saved in full."""

    def pairs(self, dtype: torch.dtype = torch.float32) -> Iterator[Pair]:
        """Every layer's pair, one after the other."""
        with TensorFile(self.folder / WEIGHTS, ExportError) as file:
            for name, scale in self.layers.items():
                A, B = (file[f"{ROOT}{name}.lora_{part}.weight"].to(dtype) for part in "AB")
                if A.shape[0] != B.shape[1]:
                    raise ExportError(
                        f"{file.path}: {name} has lora_A of shape {tuple(A.shape)} and lora_B of {tuple(B.shape)}, "
                        "whose ranks differ. Save the adapter again."
                    )
                yield Pair(name, A, B * scale)

    def extras(self) -> dict[str, Tensor]:
        """The tensors outside the pairs, by their full names."""
        with TensorFile(self.folder / WEIGHTS, ExportError) as file:
            return {name: file[name] for name in self.others}


def read_config(folder: Path) -> Any:
    """An adapter's config, of whatever method, once its files are known to be whole.

    Raises:
        ExportError: There is none, or a file is damaged; see `multiflora.adapter_folder.check_adapter`.
    """
    return check_adapter(folder, ExportError)


def read_lora(folder: Path) -> PlainLora:
    """Open a plain LoRA adapter.

    Raises:
        ExportError: It is none, or uses a form of LoRA whose update is not the product of two matrices.
    """
    config = read_config(folder)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ExportError(
            f"{folder} holds an adapter of kind {kind}; expected a plain LoRA. Convert it first: "
            f"multiflora convert {folder} --to lora --output FOLDER."
        )
    unlike = [
        name for name in ("use_dora", "lora_bias", "layer_replication", "target_parameters") if getattr(config, name, 0)
    ]
    if unlike:
        raise ExportError(f"{folder} was trained with {', '.join(unlike)}, which is more than a plain LoRA: B A alone.")
    with TensorFile(folder / WEIGHTS, ExportError) as file:
        ends = (".lora_A.weight", ".lora_B.weight")
        names = [key.removeprefix(ROOT).removesuffix(ends[0]) for key in file.names if key.endswith(ends[0])]
        others = [key for key in file.names if not key.endswith(ends)]
        strange = [key for key in others if ".lora_" in key]
        if strange or not names:
            raise ExportError(
                f"{file.path} holds {strange[0] if strange else 'no lora_A at all'}; only adapters of linear layers "
                "can be used here (not those of embeddings or convolutions)."
            )
        # the rank is that of the tensor: it is what the forward pass uses
        layers = {name: _scale(config, name) for name in names}
    return PlainLora(folder, config, layers, others)


def _scale(config: Any, name: str) -> float:
    """The factor of a layer: alpha/r or alpha/√r, with the patterns of the config."""
    r, alpha = rank_and_alpha(config, name)
    return float(alpha / math.sqrt(r) if config.use_rslora else alpha / r)


def write_lora(
    folder: Path,
    pairs: Sequence[Pair],
    like: Any,
    extras: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PlainLora:
    """Write a plain LoRA adapter with alpha = r, and read it back.

    Args:
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        pairs: Every layer's update, the scale inside B.
        like: A peft config that names the modules and the base model.
        extras: Tensors to save besides, by their full names.
        dtype: Of the saved factors.

    Raises:
        ExportError: There is nothing to write, or what was read back differs.
    """
    from peft import LoraConfig

    if not pairs:
        raise ExportError(f"There is no adapted layer to write to {folder}; the adapter is empty.")
    ranks = {pair.name: pair.A.shape[0] for pair in pairs}
    largest = max(ranks.values())
    # peft takes the first pattern that matches: a name that ends in another has to come before it
    smaller = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True) if ranks[name] != largest}
    kept: dict[str, Any] = {name: getattr(like, name) for name in KEPT if getattr(like, name, None) is not None}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        lora_dropout=0.0,
        inference_mode=True,
        **kept,
    )
    tensors = {f"{ROOT}{pair.name}.lora_A.weight": pair.A.to(dtype) for pair in pairs}
    tensors |= {f"{ROOT}{pair.name}.lora_B.weight": pair.B.to(dtype) for pair in pairs}
    write_tensors(folder / WEIGHTS, tensors | dict(extras or {}))
    with saving(folder / CONFIG):
        config.save_pretrained(str(folder))
    written = read_lora(folder)
    off = [name for name, scale in written.layers.items() if scale != 1.0]
    if off or written.layers.keys() != ranks.keys():
        raise ExportError(f"{folder} was read back and is not what was written (first layer: {(off or [*ranks])[0]}).")
    return written
