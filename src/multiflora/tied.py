"""Models whose output layer is the input embedding's own weight, and adapters that change one of the two.

Such an adapter takes the two apart, and whatever ties the model's weights again (transformers does while it loads, and
lm-evaluation-harness before it scores) fails, or puts one in the other's place without a word. So it is refused before
a training, and where a model is loaded to be scored or served. A merge can take the two apart for good, and does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from multiflora.errors import AdapterError

__all__ = ["check_tied", "tied_modules", "untie"]


def tied_modules(model: Any) -> dict[str, nn.Module]:
    """The input embedding and the output layer by their names, where they share a weight; else nothing."""
    if not hasattr(model, "get_output_embeddings"):
        return {}
    read, write = model.get_input_embeddings(), model.get_output_embeddings()
    if write is None or getattr(read, "weight", None) is not write.weight:
        return {}
    return {name: module for name, module in model.named_modules() if module is read or module is write}


def check_tied(adapted: Any, tied: Mapping[str, nn.Module]) -> None:
    """Refuse an adapter that changes a tied weight.

    Args:
        adapted: The model with the adapter.
        tied: What `tied_modules` gave before the adapter was put on.

    Raises:
        AdapterError: It does; names the module.
    """
    base = adapted.get_base_model()
    for name, module in tied.items():
        if base.get_submodule(name) is not module:
            both = " and ".join(tied)
            raise AdapterError(
                f"The adapter changes {name}, but {both} share one weight in this model: tied again, as they are when "
                "it is scored or loaded, one would take the other's place. Leave both out of target_modules, "
                "modules_to_save and trainable_token_indices."
            )


def untie(model: Any) -> None:
    """Give the output layer a weight of its own, equal to the embedding's; the config says so, too."""
    write = model.get_output_embeddings()
    with torch.no_grad():
        write.weight = nn.Parameter(write.weight.detach().clone(), requires_grad=write.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
