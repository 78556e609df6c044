"""The model as a run started, which a KL divergence and a preference are measured against.

Nothing is loaded twice. Before a fresh adapter has learned anything the model answers as its base does, so the
reference is the base with the adapter off. Where that is not so (a run that goes on from an earlier adapter, an adapter
whose start is taken off the base weight, a model that is trained whole) the trained tensors are kept as they were, and
change places with the present ones for as long as the reference is asked. A fresh learned prompt starts at random, and
away from the base model: it is measured against that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from multiflora.methods.layer_pass import BranchLayer
from multiflora.methods.layer_weights import OFFSET
from multiflora.training.adapter import takes_start_off

__all__ = ["Reference", "evaluating", "leave_loss_out"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside, and with branches that are prepared for inference where there is no gradient.

    Args:
        model: Any model.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def leave_loss_out(base: Any) -> None:
    """Take out of a model's outputs the loss that trl's fused head makes beside the log-probabilities.

    Adapters add their losses (balance, alignment) to a loss that they find there; with none to find, they are fetched
    by `multiflora.auxiliary_loss` and weigh what they should, whatever becomes of the log-probabilities.

    Args:
        base: A model that has the head; `own_forward` takes this off together with it.
    """
    fused = base.forward

    @functools.wraps(fused)  # generate looks at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = fused(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            output["loss"] = None
        return output

    base.forward = forward


class Reference(nn.Module):
    """Answers as the model did when this was made; see the module.

    Args:
        model: The model that will be trained, with its adapter, or one that is trained whole.
        is_fresh: Whether its adapter has learned nothing yet.
    Example:
        >>> Reference(model, is_fresh=True)(input_ids=ids).logits  # doctest: +SKIP
    """

    def __init__(self, model: Any, *, is_fresh: bool) -> None:
        super().__init__()
        self.config = model.config
        self._of: tuple[Any] = (model,)  # in a tuple: it is no part of this module
        off = is_fresh and isinstance(model, PeftModel) and not takes_start_off(model.active_peft_config)
        self._start: dict[str, Tensor] | None = None if off else _copied(model)
        self.log_probs: Tensor | None = None
        """What the last call has returned by that name, if anything."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as it was, without gradient."""
        [model] = self._of
        with torch.no_grad(), evaluating(model), self._as_it_was(model):
            output = model(*args, **kwargs)
        self.log_probs = getattr(output, "log_probs", None)
        return output

    @contextmanager
    def _as_it_was(self, model: Any) -> Iterator[None]:
        if self._start is None:
            with model.disable_adapter():
                yield
            return
        # the places of the tensors change and not what is in them: a gradient may still want that
        now = {name: tensor for name, tensor in _changing(model) if name in self._start}
        places = {name: tensor.data for name, tensor in now.items()}
        try:
            for name, tensor in now.items():
                tensor.data = self._start[name]
            yield
        finally:
            for name, tensor in now.items():
                tensor.data = places[name]


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a training changes: those with gradients, and what a method lets follow them."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BranchLayer):
            for adapter in layer.configs:
                parts = layer.parts(adapter).items()
                yield from ((f"{layer_name}.{adapter}.{part}", tensor) for part, tensor in parts if part in OFFSET)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _changing(model)}
