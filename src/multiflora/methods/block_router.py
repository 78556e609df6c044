r"""One router for a whole feed-forward block, as MixLoRA has it (Li et al. 2024, arXiv 2404.15159, eq. 2-5).

.. math::
    g = \operatorname{softmax}(\text{top-}k\,(R h)), \qquad
    y_\ell = W_\ell x_\ell + s \sum_e g_e B_{\ell,e} A_{\ell,e} x_\ell
    \quad \text{for each layer } \ell \text{ of the block}

h is what enters the block, so experts are chosen once for a token, and its layers agree: an expert is a whole block.
The first adapted layer of the block reads h. It holds R, makes the gate, and leaves it for the others in what the
forward pass remembers (`multiflora.context.Routing.leave`); they take it from there, and hold no router of their own.

A block is the module that holds the layers, such as ``mlp``. In attention each layer keeps a router of its own, as its
last layer sees mixed tokens and no paper routes it by what came in; and so does each layer of a list, which are experts
side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from multiflora.methods.targets import can_adapt
from multiflora.peft_bridge import layer_widths

if TYPE_CHECKING:
    from torch import nn

__all__ = ["block_group", "fit_problems", "shared_router"]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def shared_router(config: Any) -> tuple[str, ...]:
    """Which tensors a block's layers have in common; see ``Method.shared``."""
    return ("router",) if config.router_per == "block" else ()


def block_group(config: Any, name: str) -> str:
    """The block that a layer is in; the layer's own name where it shares with nobody. See ``Method.group``.

    Example:
        >>> block_group(None, "model.layers.0.mlp.up_proj"), block_group(None, "model.layers.0.self_attn.q_proj")
        ('model.layers.0.mlp', 'model.layers.0.self_attn.q_proj')
    """
    parent, _, own = name.rpartition(".")
    return name if not parent or own.isdigit() or _ATTENTION.search(parent) else parent


def fit_problems(config: Any, model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """What stands in the way of a router for each block in this model, a sentence each.

    Args:
        config: The adapter's.
        model: The model.
        names: The layers to adapt, in the model's order.
    """
    if getattr(config, "router_per", "layer") != "block":
        return
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_group(config, name), []).append(name)
    entries = {block: _linear(model.get_submodule(block)) for block, layers in blocks.items() if block not in layers}
    if all(len(entry) < 2 for entry in entries.values()):
        yield (
            "router_per is 'block', and none of the adapted layers is in a feed-forward block, a module that holds two "
            "linear layers or more. Name those of it in target_modules, such as gate_proj, up_proj and down_proj; or "
            "set router_per='layer'."
        )
    for block, entry in entries.items():
        first, *others = blocks[block]
        counts = {name: getattr(config.at(name), config.heads_setting) for name in blocks[block]}
        for other in [name for name in others if counts[name] != counts[first]][:1]:
            yield (
                f"router_per is 'block', and {first} has {counts[first]} heads where {other} has {counts[other]}: one "
                f"router for both has one number. Give all layers of {block} the same."
            )
        # it reads what enters the block where it is the block's first layer, or stands beside that and is of its shape
        name, layer = next(iter(entry.items()))
        if first != f"{block}.{name}" and layer_widths(layer) != layer_widths(_bare(model.get_submodule(first))):
            yield (
                f"router_per is 'block', and what enters {block} is read by {name}, which is not adapted: the router "
                f"would read what {first.rpartition('.')[2]} does. Add {name!r} to target_modules, or set "
                "router_per='layer'."
            )


def _linear(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that a module holds itself, without what adapters have put around them."""
    return {name: layer for name, child in block.named_children() if can_adapt(layer := _bare(child))}


def _bare(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
