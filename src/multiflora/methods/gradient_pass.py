r"""The gradient of whole weights at the base model, a few layers at a time: what LoRA-GA starts from.

.. math:: G_\ell = \sum_{\text{batches}} \sum_{\text{tokens}} \frac{\partial L}{\partial y_\ell}\, x_\ell^\top

is summed from what enters and leaves a layer, so it needs no gradient of the frozen weight and works on quantised ones.
Only as many layers are watched at a time as ``bytes_at_once`` allows; the batches are run once for each such group. A
layer that has its start leaves the model what it was, so all groups see the base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from multiflora.context import configs_of
from multiflora.errors import AdapterError
from multiflora.methods.layer import BranchLinear

__all__ = ["start_from_gradients", "weight_gradients"]


def start_from_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    bytes_at_once: int = 1 << 30,
) -> None:
    """Give a fresh adapter the start that its method takes from the gradient of the loss (LoRA-GA).

    Args:
        model: A model with the adapter, before its first step.
        batches: A few batches as the model takes them, with labels. Each may have any number of rows.
        adapter_name: Which adapter.
        bytes_at_once: How much memory the gradients may take together; one layer's is held in any case.

    Raises:
        AdapterError: The adapter's method takes no start from a gradient, a layer is too small for its rank, or a batch
            brings no loss.

    Example:
        >>> multiflora.start_from_gradients(model, [tokenizer(texts, return_tensors="pt")])  # doctest: +SKIP
    """
    config = configs_of(model).get(adapter_name)
    layers = [m for m in model.modules() if isinstance(m, BranchLinear) and adapter_name in m.configs]
    if config is None or not layers or layers[0].method_of(adapter_name).gradient_start is None:
        raise AdapterError(
            f"Adapter {adapter_name!r} takes no start from a gradient: it is "
            f"{'not on this model' if config is None else config.method_name}. Use LoraGaConfig, or leave the call out."
        )
    if not any(layer.learns(adapter_name) for layer in layers):
        raise AdapterError(
            f"Adapter {adapter_name!r} is not in use, or not being trained; the gradient would be another adapter's. "
            f"Activate it first: model.set_adapter({adapter_name!r})."
        )
    for layer in layers:
        least, r = min(layer.in_features, layer.out_features), layer.ranks[adapter_name]
        if 2 * r > least:
            raise AdapterError(
                f"{layer.name} is {layer.out_features} x {layer.in_features} and r is {r}; LoRA-GA needs 2 r "
                f"directions of its gradient. Set r to at most {least // 2} (rank_pattern, for this layer alone), or "
                "leave the layer out."
            )
        if hasattr(layer.parts(adapter_name)["A"], "device_mesh"):
            raise AdapterError(
                f"{layer.name} is divided among processes; the start from a gradient needs whole matrices. Start the "
                "adapter in one process, save it, and train it sharded from there; or use LoRA."
            )
    if any(layer.has_learned(adapter_name) for layer in layers):
        raise AdapterError(
            f"Adapter {adapter_name!r} has been trained already, or starts at random (init_weights=False); a start "
            "from the gradient would replace what it has learned. Train it on as it is, or add a fresh adapter."
        )
    kept = list(batches)
    if not kept:
        raise AdapterError("There is no batch to take the gradient over; give at least one.")
    for group in _groups(layers, bytes_at_once):
        gradients = weight_gradients(model, group, kept)
        for layer in group:
            _set_start(layer, adapter_name, gradients.pop(layer))


def weight_gradients(
    model: nn.Module, layers: Sequence[BranchLinear], batches: Iterable[Mapping[str, Any]]
) -> dict[BranchLinear, Tensor]:
    """G of each of the layers, (d_out, d_in), float32 at least, summed over the batches in eval mode.

    Raises:
        AdapterError: A batch brings no loss.
    """
    sums: dict[BranchLinear, Tensor] = {}
    handles = [layer.register_forward_hook(partial(_watch, sums)) for layer in layers]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise AdapterError("A batch brought no loss; give batches with labels.")
            loss.backward()
    finally:
        for module, before in training.items():
            module.training = before
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
    return sums


def _watch(sums: dict[BranchLinear, Tensor], layer: BranchLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
    x = args[0].detach()

    def add(dy: Tensor) -> None:
        dtype = torch.promote_types(dy.dtype, torch.float32)
        own = dy.reshape(-1, dy.shape[-1]).to(dtype).t() @ x.reshape(-1, x.shape[-1]).to(dtype)
        sums[layer] = sums[layer].add_(own) if layer in sums else own

    if output.requires_grad:
        output.register_hook(add)  # type: ignore[no-untyped-call]


def _groups(layers: Sequence[BranchLinear], bytes_at_once: int) -> Iterator[list[BranchLinear]]:
    """Neighbouring layers whose gradients fit together, in float32."""
    group: list[BranchLinear] = []
    held = 0
    for layer in layers:
        size = 4 * layer.in_features * layer.out_features
        if group and held + size > bytes_at_once:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    yield group


def _set_start(layer: BranchLinear, adapter_name: str, gradient: Tensor) -> None:
    """A, B and the offset, in place; the offset is that of the factors as they are stored."""
    method, config, parts = layer.method_of(adapter_name), layer.configs[adapter_name], layer.parts(adapter_name)
    assert method.gradient_start is not None
    A, B = method.gradient_start(config, gradient, layer.ranks[adapter_name])
    with torch.no_grad():
        parts["A"].copy_(A)
        parts["B"].copy_(B)
        parts["A0"].copy_(parts["A"])
        parts["B0"].copy_(parts["B"])
