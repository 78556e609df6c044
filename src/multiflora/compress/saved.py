"""A compressed model on disk: ordinary safetensors and config, and one file that says which layers have which form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from multiflora.compress.layer import LoSparseLinear, compressed_layers, put_layers
from multiflora.errors import ExportError
from multiflora.files import user_path, write_json
from multiflora.tensor_file import write_tensors

__all__ = ["FORM", "load_compressed", "save_compressed"]

FORM = "losparse.json"
WEIGHTS = "model.safetensors"


def save_compressed(model: Any, folder: Path) -> None:
    """Write a model whose layers are L R + S; every tensor is read back and compared.

    All numbers are written in the type of the embeddings, which are as they were loaded: the factors were float32 only
    to be trained.

    Args:
        model: The model.
        folder: An empty folder.
    """
    layers, dtype = compressed_layers(model), model.get_input_embeddings().weight.dtype
    form = {
        name: {"d_in": layer.in_features, "d_out": layer.out_features, "rank": layer.L.shape[1], "rows": len(layer.S),
               "bias": layer.bias is not None}
        for name, layer in layers.items()
    }  # fmt: skip
    tensors = {
        name: value.detach().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
        # a layer may have lost all rows of S
        if name not in _tied(model) and value.numel()
    }
    write_tensors(folder / WEIGHTS, tensors)
    model.config.save_pretrained(str(folder))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    write_json(folder / FORM, {"dtype": str(dtype).removeprefix("torch."), "layers": form})


def load_compressed(folder: str | Path) -> Any:
    """Load a model that a run with ``method: losparse`` has written, in eval mode.

    Args:
        folder: Its folder.

    Raises:
        ExportError: The folder holds none, or its files do not belong together.

    Example:
        >>> model = multiflora.load_compressed("runs/small")  # doctest: +SKIP
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    place = user_path(folder)
    if not (place / FORM).is_file() or not (place / WEIGHTS).is_file():
        raise ExportError(
            f"{place} holds no compressed model ({FORM} and {WEIGHTS}). A run with method: losparse writes one."
        )
    form = json.loads((place / FORM).read_text("utf-8"))
    dtype = getattr(torch, form["dtype"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(place)), dtype=dtype)
    made = {
        name: LoSparseLinear(it["d_in"], it["d_out"], it["rank"], it["rows"], bias=it["bias"]).to(dtype)
        for name, it in form["layers"].items()
    }
    put_layers(model, made)
    missing, unexpected = model.load_state_dict(load_file(place / WEIGHTS), strict=False)
    none_left = {f"{name}.{part}" for name, it in form["layers"].items() if not it["rows"] for part in ("S", "rows")}
    lost = sorted({*missing} - _tied(model) - none_left) + sorted(unexpected)
    if lost:
        raise ExportError(f"{place / WEIGHTS} and {FORM} do not belong together (first: {lost[0]}). Compress again.")
    model.tie_weights()
    return model.eval()


def _tied(model: Any) -> set[str]:
    """Names of the weights that are another's: the head's, where it is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}
