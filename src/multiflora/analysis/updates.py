"""What training added to each weight matrix, whatever the method: as two factors, or as one matrix where it must be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from multiflora.analysis.spectrum import low_rank_svd
from multiflora.compress.layer import LoSparseLinear
from multiflora.errors import AdapterError
from multiflora.methods.initial import head_views
from multiflora.methods.layer import BranchLinear

__all__ = ["Update", "adapter_updates", "decompose", "dense_updates", "heads_of", "place_of_layer"]

_LAYER = re.compile(r"\.(\d+)\.")


class Update(NamedTuple):
    """The update of one weight matrix, B A, or a dense one."""

    B: Tensor
    """(d_out, k); the whole update (d_out, d_in) where A is None."""
    A: Tensor | None
    """(k, d_in)."""


def place_of_layer(name: str) -> tuple[int, str]:
    """A layer's number (-1 where it has none) and its module's name, from its path.

    Example:
        >>> place_of_layer("model.layers.12.self_attn.q_proj")
        (12, 'q_proj')
    """
    found = _LAYER.search(f"{name}.")
    return (int(found.group(1)) if found else -1), name.rpartition(".")[2]


def adapter_updates(model: Any, gates: Mapping[str, Tensor] | None = None) -> dict[str, Update]:
    """The updates of an adapter, layer by layer.

    A method with a router has one update for each token; the one given here blends its heads with the mean gate. One
    that is gated by task has one for each task; here it is their mean.

    Args:
        model: A peft model with one adapter.
        gates: Layer -> mean gate (H,) over real tokens; None: all heads alike.

    Raises:
        AdapterError: The adapter adds nothing to weight matrices, as prompt methods and IA³ do not.
    """
    found = dict(_updates(model, gates or {}))
    if not found:
        kind = getattr(model.peft_config.get("default"), "peft_type", type(model).__name__)
        raise AdapterError(
            f"A {getattr(kind, 'value', kind)} adapter adds nothing to weight matrices, so there is no update to "
            "analyse; LoRA and its relatives, multi-branch methods and full fine-tuning have one."
        )
    return found


def _updates(model: Any, gates: Mapping[str, Tensor]) -> Iterator[tuple[str, Update]]:
    base = model.get_base_model()
    for name, layer in base.named_modules():
        if isinstance(layer, BranchLinear):
            for adapter in layer.active_adapters:
                if adapter in layer.configs:
                    yield name, _of_branches(layer, adapter, gates.get(layer.name))
        elif isinstance(layer, AdaLoraLayer):
            for adapter in layer.active_adapters:
                yield name, _of_adalora(layer, adapter)
        elif isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    yield name, _of_lora(layer, adapter)


def _of_branches(layer: BranchLinear, adapter: str, gate: Tensor | None) -> Update:
    config, method = layer.configs[adapter], layer.method_of(adapter)
    heads = method.heads(config)
    if not method.needs_task():
        if gate is None:
            gate = torch.ones(heads) if method.gate.reads == "nothing" else torch.full((heads,), 1 / heads)
        A, B = layer.factors(adapter, gate)
        return Update(B, A)
    pairs = [layer.factors(adapter, task=task) for task in range(config.num_tasks or 1)]
    return Update(torch.stack([B for _, B in pairs]).mean(0), pairs[0][0])


def _of_adalora(layer: Any, adapter: str) -> Update:
    A = layer.lora_A[adapter].detach().float() * layer.lora_E[adapter].detach().float()
    scale = layer.scaling[adapter] / (float(layer.ranknum[adapter]) + 1e-5)  # as in its forward pass
    return Update(layer.lora_B[adapter].detach().float() * scale, A)


def _of_lora(layer: Any, adapter: str) -> Update:
    A, B = layer.lora_A[adapter].weight.detach().float(), layer.lora_B[adapter].weight.detach().float()
    B = B * layer.scaling[adapter]
    if not layer.use_dora.get(adapter, False):
        return Update(B, A)
    weight: Tensor = layer.get_base_layer().weight.detach().float()
    changed = weight + B @ A
    magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
    return Update(changed * (magnitude / changed.norm(dim=1)).unsqueeze(1) - weight, None)


def dense_updates(model: Any, base: Any) -> dict[str, Update]:
    """What full fine-tuning, or LoSparse, changed in each linear layer but the head.

    Args:
        model: The model after training.
        base: The model before it.
    """
    before = dict(base.named_modules())
    return {
        name: Update(_weight(layer) - before[name].weight.detach().float(), None)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | LoSparseLinear) and layer is not model.get_output_embeddings()
    }


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.dense() if isinstance(layer, LoSparseLinear) else layer.weight
    return weight.detach().float()


def decompose(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and V of an update, on the CPU; see `low_rank_svd`."""
    if update.A is not None:
        return low_rank_svd(update.B.cpu(), update.A.cpu())
    u, s, vh = torch.linalg.svd(update.B.cpu().to(torch.float64), full_matrices=False)
    return u, s, vh.t()


def heads_of(model: Any) -> dict[str, Tensor]:
    """Layer -> its heads B_h, (H, d_out, r), for adapters of several heads; empty for any other."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BranchLinear):
            for adapter in layer.active_adapters:
                if adapter in layer.configs:
                    heads = layer.method_of(adapter).heads(layer.configs[adapter])
                    found[name] = torch.stack(head_views(layer.parts(adapter)["B"].detach().cpu(), heads))
    return found
