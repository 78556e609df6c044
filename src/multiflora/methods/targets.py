"""Which layers can be adapted, and where a model uses a layer's weight besides."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from multiflora.peft_bridge import quantization_backend

__all__ = ["can_adapt", "identity", "places_of_weights", "reads_weight_itself"]

_MAMBA_KINDS = ("falcon_h1", "nemotron_h")
"""Models with Mamba blocks whose kind does not say so."""


def can_adapt(module: nn.Module) -> bool:
    """Whether a layer is of a kind that can carry branches."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = quantization_backend(module, {})
    return backend is not None and backend.layer_type == "linear"


def reads_weight_itself(model: nn.Module, name: str) -> str | None:
    """What computes with a layer's weight in place of calling the layer, so that no adapter on it has an effect.

    Args:
        model: The model.
        name: Of the layer.

    Returns:
        "...'s code, which reads", for a sentence; None where the layer is called.
    """
    above, _, own = name.rpartition(".")
    parent = model.get_submodule(above)
    if isinstance(parent, nn.MultiheadAttention) and own == "out_proj":
        return "nn.MultiheadAttention, which reads"
    fast = torch.backends.mha.get_fastpath_enabled()
    if fast and isinstance(parent, nn.TransformerEncoderLayer) and own in ("linear1", "linear2"):
        return (
            "nn.TransformerEncoderLayer, whose fast path for inference (unless torch.backends.mha."
            "set_fastpath_enabled(False) was called) reads"
        )
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if own in ("out_proj", "conv1d") and ("mamba" in kind or kind in _MAMBA_KINDS or hasattr(parent, "A_log")):
        return "a Mamba block, whose fused kernels read"
    return None


def places_of_weights(model: nn.Module) -> dict[object, list[str]]:
    """In which places of a model each weight is used: the names of the modules that own it, where they hang.

    A tied weight (an output layer's, which is the embedding's) has two, and so has a module that hangs in two places,
    of which one was adapted. An adapted layer that is reached in two ways is one place: there a merge is exact.
    """
    places: dict[object, list[str]] = {}
    for name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            weight = None if child is None else child._parameters.get("weight")
            if weight is not None:
                places.setdefault(identity(weight), []).append(f"{name}.{child_name}".lstrip("."))
    return places


def identity(weight: torch.Tensor) -> object:
    """The same for two parameters that hold the same numbers in the same memory."""
    if weight.is_meta or type(weight) not in (nn.Parameter, torch.Tensor) or not weight.numel():
        return id(weight)
    return weight.device, weight.data_ptr()
