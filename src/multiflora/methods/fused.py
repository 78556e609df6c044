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

__all__ = ["LEFT_OUT", "PRODUCTS", "by_layer", "fused_parameters", "left_out", "targeted", "why_not"]

LEFT_OUT = "all-linear adapts linear layers alone"
"""How the sentence of `left_out` begins."""
PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the matrices of its experts."""
LAYOUT = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What it says of the layout of experts that it knows."""


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


def targeted(model: nn.Module, targets: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """The parameters that ``target_parameters`` means, as peft reads it: whole names, or how names end.

    Returns:
        Name of each -> the module that holds it, and its name there.
    """
    endings = tuple(targets)
    found = {}
    for name, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            whole = f"{name}.{own}".replace(".base_layer", "")
            if any(whole == ending or whole.endswith(f".{ending}") for ending in endings):
                found[whole] = (module, own)
    return found


def why_not(module: nn.Module, parameter: str) -> str:
    """Why branches cannot be added to the products of a parameter, in words that follow its name; empty where they can.

    transformers says of the experts that it can compute in several ways how they are laid out; others are only known to
    their own code.
    """
    tensor = module._parameters.get(parameter)
    if tensor is None or tensor.dim() != 3 or parameter not in PRODUCTS:
        return f"is no matrix of experts; those are {', '.join(PRODUCTS)} of shape (E, ., .)"
    if not all(hasattr(module, word) for word in LAYOUT):
        return f"belongs to {type(module).__name__}, whose layout only its own code knows"
    if not tensor.is_floating_point() or tensor.element_size() < 2 or type(tensor).__name__ != "Parameter":
        return f"is quantised ({type(tensor).__name__} of {tensor.dtype}); load the model with whole experts"
    if getattr(module, "_is_expert_parallel", False):
        return "is spread over processes by experts (expert parallelism); load the model without"
    return ""


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
    words = ", ".join(dict.fromkeys(repr(".".join(name.split(".")[-2:])) for name in missing))
    return (
        f"{LEFT_OUT}; the experts of this mixture are none and stay as they are: {listed}. To adapt them, too: "
        f"target_parameters=[{words}]."
    )


def by_layer(names: Iterable[str]) -> dict[str, int]:
    """Count names of modules or parameters, the layer's number written ``*``.

    Example:
        >>> by_layer(["layers.0.up", "layers.1.up"])
        {'layers.*.up': 2}
    """
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
