"""The experts of mixture models, where a model keeps them as fused parameters: one tensor for all experts of a layer.

transformers keeps most mixtures so: ``experts.gate_up_proj`` of shape (E, 2 f, d) and ``experts.down_proj`` of
(E, d, f) hold the weights of E experts, and there is no linear layer that an adapter of modules could find.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LEFT_OUT", "by_layer", "fused_parameters", "left_out"]

LEFT_OUT = "all-linear adapts linear layers alone"
"""How the sentence of `left_out` begins."""


def fused_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every fused parameter of a model: its name, without what adapters have put around it, and who holds it.

    Example:
        >>> list(fused_parameters(torch.nn.Linear(2, 2)))
        []
    """
    for name, module in model.named_modules():
        experts = getattr(module, "num_experts", None)
        if isinstance(experts, int):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and len(parameter) == experts:
                    yield f"{name}.{own}".replace(".base_layer", ""), module


def left_out(model: nn.Module, adapted: Collection[str] = ()) -> str:
    """Say in a line which fused experts no adapter of linear layers reaches; empty where there are none.

    Args:
        model: The model, or the base model of an adapted one.
        adapted: Names of the parameters that are adapted all the same.
    """
    missing = [name for name, _ in fused_parameters(model) if name not in adapted]
    if not missing:
        return ""
    listed = ", ".join(f"{count} x {name}" for name, count in by_layer(missing).items())
    return f"{LEFT_OUT}; the experts of this mixture are none and stay as they are: {listed}."


def by_layer(names: Iterable[str]) -> dict[str, int]:
    """Count names of modules or parameters, the layer's number written ``*``.

    Example:
        >>> by_layer(["layers.0.up", "layers.1.up"])
        {'layers.*.up': 2}
    """
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
