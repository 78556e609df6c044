r"""Trained LoRAs as the experts of one adapter, in which a router blends them for each token.

.. math:: y = W x + \sum_{h=1}^{K} \operatorname{softmax}(R x)_h\, B_h A_h x

The experts stay as they were trained and only R learns. R starts at zero, where the adapter is the mean of the LoRAs.
It is an adapter of the method ``parts``, so whatever goes with that goes with this one: training, scoring, serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multiflora.errors import ConfigError
from multiflora.export.plain import CONFIG, ROOT, WEIGHTS, PlainLora
from multiflora.export.saved import open_adapter
from multiflora.export.stage import staged
from multiflora.files import saving
from multiflora.methods import build_config
from multiflora.tensor_file import write_tensors

__all__ = ["SETTINGS", "route", "routed_settings"]

SETTINGS = {"stem": "own", "gate": "token", "router_init": "zero", "frozen": ["A", "B"]}
"""What makes ``parts`` a router over experts that are there."""


def routed_settings(loras: Sequence[PlainLora]) -> dict[str, Any]:
    """The settings of ``parts`` that hold these LoRAs: of the largest rank among them, each with scale 1.

    Args:
        loras: At least two, of one base model.
    """
    rank = max(len(pair.A) for lora in loras for pair in lora.pairs())
    return {**SETTINGS, "num_heads": len(loras), "r": rank, "lora_alpha": rank, **_modules(loras)}


def _modules(loras: Sequence[PlainLora]) -> dict[str, Any]:
    """The layers of all, in the words of the first where these name them all, else one by one."""
    first = loras[0]
    if all(lora.layers.keys() == first.layers.keys() for lora in loras):
        words = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        found = {word: value for word in words if (value := getattr(first.config, word))}
        return {word: sorted(value) if isinstance(value, set) else value for word, value in found.items()}
    return {"target_modules": sorted({name for lora in loras for name in lora.layers})}


def route(loras: Sequence[PlainLora], folder: Path) -> dict[str, Any]:
    """Write the adapter and read it back. A layer that a LoRA lacks, and ranks it lacks, are zero in its expert.

    Args:
        loras: At least two, of one base model.
        folder: Where the adapter goes; whole, or not at all.

    Returns:
        Its settings, as a recipe's ``method`` section has them.

    Raises:
        ConfigError: The LoRAs are of layers with different widths, so of different base models.
    """
    settings = routed_settings(loras)
    first = loras[0].config
    config = build_config("parts", settings | {"task_type": first.task_type})
    config.base_model_name_or_path, config.revision = first.base_model_name_or_path, first.revision
    with staged(folder) as place:
        write_tensors(place / WEIGHTS, _tensors(loras, settings["r"]))
        with saving(place / CONFIG):
            config.save_pretrained(str(place))
        for _ in open_adapter(place).layers():
            pass
    return {"name": "parts", **settings}


def _tensors(loras: Sequence[PlainLora], rank: int) -> dict[str, Tensor]:
    """All experts of a layer side by side: A (K r, d_in), B (d_out, K r), and the router (K, d_in) at zero."""
    found: dict[str, Tensor] = {}
    for h, lora in enumerate(loras):
        rows = slice(h * rank, h * rank + rank)
        for pair in lora.pairs():
            stem = f"{ROOT}{pair.name}.mf_parts_"
            (k, d_in), d_out = pair.A.shape, len(pair.B)
            A = found.setdefault(f"{stem}A", torch.zeros(len(loras) * rank, d_in))
            B = found.setdefault(f"{stem}B", torch.zeros(d_out, len(loras) * rank))
            found.setdefault(f"{stem}router", torch.zeros(len(loras), d_in))
            if (A.shape[1], len(B)) != (d_in, d_out):
                raise ConfigError(
                    f"{pair.name} is {d_in} -> {d_out} in {lora.folder} and {A.shape[1]} -> {len(B)} in the adapters "
                    "before it, so they are of different base models. Give adapters of one."
                )
            A[rows][:k], B[:, rows][:, :k] = pair.A, pair.B
    return found
