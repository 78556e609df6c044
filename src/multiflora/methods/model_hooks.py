"""What is hung on a model so that its adapted layers know of each pass: hooks, and ``generate`` with a task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from multiflora.context import Routing, task
from multiflora.errors import AdapterError
from multiflora.methods.experts import BranchExperts
from multiflora.methods.layer_pass import BranchLayer

__all__ = ["give_names", "hooks_of", "note_places"]

# what lists of experts are called, where a layer is in no other list
_EXPERTS = re.compile(r"experts?\w*\.")


def note_places(routing: Routing, model: nn.Module) -> None:
    """Note of the adapted layers what decides whose tokens they see: a decoder, experts, any list of modules."""
    decoder, inside = _decoder(model), dict[nn.Module, int]()
    for _, module in model.named_modules():  # parents come before their children
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        for child in module.children():
            inside[child] = inside.get(module, 0) + listed
    of_decoder = set() if decoder is None else set(decoder.modules())
    layers = [layer for layer in model.modules() if isinstance(layer, BranchLayer)]
    routing.decoder_layers = frozenset(layer.name for layer in layers if layer in of_decoder)
    routing.listed = frozenset(layer.name for layer in layers if inside.get(layer))
    routing.shared_out = frozenset(
        layer.name
        for layer in layers
        if not isinstance(layer, BranchExperts)  # which see all tokens, and know whose they are
        and (inside.get(layer, 0) > 1 or (inside.get(layer) and _EXPERTS.search(layer.name)))
    )


def _decoder(model: Any) -> nn.Module | None:
    """The decoder of a model that has an encoder, too."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def hooks_of(routing: Routing, model: nn.Module) -> Iterator[Any]:
    """Whatever tells the layers of a pass: on the model, on its backbone called by itself, and on ``generate``."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    for module in dict.fromkeys((model, backbone)):
        if isinstance(module, nn.Module):
            yield module.register_forward_pre_hook(routing.begin, with_kwargs=True)
            yield module.register_forward_hook(routing.end, with_kwargs=True, always_call=True)
    decoder = _decoder(model)
    if decoder is not None:
        yield decoder.register_forward_pre_hook(routing.enter_decoder, with_kwargs=True)
    if hasattr(model, "generate"):
        yield _Generate(model)


class _Generate:
    """``generate`` of a model whose adapters may want to know tasks, in its place until it is removed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before = vars(model).get("generate")
        model.generate = self

    def __call__(self, *args: Any, task_id: Any = None, **kwargs: Any) -> Any:
        """The model's ``generate``; ``task_id`` is the task of all rows or of each (its beams share it)."""
        call = partial(type(self.model).generate, self.model) if self.before is None else self.before
        if task_id is None:
            return call(*args, **kwargs)
        which = task_id.tolist() if isinstance(task_id, torch.Tensor) else task_id
        if isinstance(which, (list, tuple)) and any(not isinstance(one, (str, int)) for one in which):
            raise AdapterError(
                "generate takes one task for all rows or one for each, by name or id, and not one for each token: "
                f"task_id is {task_id!r}."
            )
        with task(self.model, which):
            return call(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there before."""
        if vars(self.model).get("generate") is self:
            del self.model.generate
            if self.before is not None:
                self.model.generate = self.before


def give_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: the module is told each row's adapter."""
    return args, kwargs | {"adapter_names": names}
