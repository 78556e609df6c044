"""Run examples through a routed adapter and keep each layer's moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from multiflora.context import configs_of
from multiflora.errors import ExportError
from multiflora.export.examples import Tokens
from multiflora.export.moments import Moments, features
from multiflora.methods.layer import BranchLinear

__all__ = ["Observed", "active_adapter", "observe"]

_HELD_OUT = 4
"""One example in four is kept from the fit; the error is measured on it."""
_ROWS = 8
"""Examples of a forward pass."""


@dataclass(frozen=True)
class Observed:
    """What one layer did."""

    fit: Moments
    """On the examples that gates are averaged and matrices fitted on."""
    test: Moments
    """On those held out; the same as ``fit`` where there are fewer than four."""


def observe(
    model: nn.Module, examples: Sequence[Tokens], *, by_task: bool = False
) -> dict[str | None, dict[str, Observed]]:
    """Run examples through the model, and return what its adapted layers did, by task and layer name.

    Args:
        model: Carries one active adapter with a token router.
        examples: As tokens; one in four of each task is held out to measure the error.
        by_task: Keep tasks apart; otherwise everything is under None.

    Raises:
        ExportError: With ``by_task``: an example names no task.
    """
    groups: dict[tuple[str | None, bool], list[list[int]]] = defaultdict(list)
    seen: dict[str | None, int] = defaultdict(int)
    for number, example in enumerate(examples):
        if by_task and example.task is None:
            raise ExportError(
                f"Calibration example {number} names no task, which one adapter for each task needs. Give every row a "
                "'task', or leave --per-task out for one adapter for all."
            )
        key = example.task if by_task else None
        seen[key] += 1
        groups[key, seen[key] % _HELD_OUT == 0].append(example.ids)
    sums: dict[tuple[str | None, bool], dict[str, Moments]] = {
        which: _moments(model, rows) for which, rows in groups.items()
    }
    return {
        key: {
            name: Observed(moments, sums.get((key, True), layers).get(name, moments))
            for name, moments in layers.items()
        }
        for (key, held_out), layers in sums.items()
        if not held_out
    }


def active_adapter(model: nn.Module) -> str:
    """Name of the one adapter of ours that is active.

    Raises:
        ExportError: There is none, or more than one.
    """
    layer = next((module for module in model.modules() if isinstance(module, BranchLinear)), None)
    active = [] if layer is None else [name for name in layer.active_adapters if name in configs_of(model)]
    if len(active) != 1:
        raise ExportError(
            f"The model has {len(active)} active multiflora adapters ({', '.join(active) or 'none'}); expected exactly "
            "one. Activate the one to convert with set_adapter(NAME)."
        )
    return str(active[0])


def _moments(model: nn.Module, rows: Sequence[Sequence[int]]) -> dict[str, Moments]:
    """The moments of every adapted layer over some rows."""
    adapter = active_adapter(model)
    sums: dict[str, Moments] = {}
    was_training = model.training
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.enter_context(torch.inference_mode())
        for module in model.modules():
            if isinstance(module, BranchLinear):
                stack.callback(module.register_forward_hook(partial(_add, sums, adapter)).remove)
        model.eval()
        for ids, mask in _batches(rows, device):
            model(input_ids=ids, attention_mask=mask)
    return sums


def _batches(rows: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    # rows of like length beside each other: less padding
    ordered = sorted((row for row in rows if row), key=len)
    for start in range(0, len(ordered), _ROWS):
        batch = ordered[start : start + _ROWS]
        length = len(batch[-1])
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch], device=device)
        yield ids, mask


def _add(sums: dict[str, Moments], adapter: str, layer: BranchLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
    """The forward hook: add this batch's real tokens."""
    x, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
    keep = layer.routing.tokens(layer.name, args[0]).keep()
    method, config = layer.method_of(adapter), layer.configs[adapter]
    gate = layer.routing.left(adapter, method.group(config, layer.name))  # where a block has one for its layers
    if keep is not None:
        x, y = x[keep.bool()], y[keep.bool()]
        gate = None if gate is None else gate[:, keep.bool()]
    parts: Mapping[str, Tensor] = layer.parts(adapter)
    found = features(method, config, parts, x, y, gate).cpu()
    sums[layer.name] = sums[layer.name].add(found) if layer.name in sums else found
