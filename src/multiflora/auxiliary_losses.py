"""What layers add to the loss (balance, alignment), put into the model's own loss, once.

A model's loss comes out of its forward pass, so a trainer that uses it needs to know nothing of these. Trainers that
take their loss from elsewhere find them by `multiflora.auxiliary_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multiflora.errors import AdapterError
from multiflora.forward_pass import Pass

__all__ = ["pulled", "total_of", "with_loss"]

_IGNORED = -100


def with_loss(output: Any, found: Pass, kwargs: Mapping[str, Any]) -> Any:
    """The output with the layers' losses in its loss; as it was where it has none."""
    own = output.get("loss") if isinstance(output, Mapping) else None
    plain = isinstance(output, tuple) and kwargs.get("labels") is not None
    if plain:
        own = output[0]
    if not isinstance(own, Tensor) or own.numel() != 1 or not own.is_floating_point():
        return output
    found.counted = "loss"
    total = total_of(found) * _share(kwargs)
    if not torch.compiler.is_compiling() and total.requires_grad:
        total, by_token, found.asked = _Once.apply(total, found)  # type: ignore[no-untyped-call]
        probs = output.get("log_probs") if isinstance(output, Mapping) else None
        if isinstance(probs, Tensor) and probs.requires_grad:
            output["log_probs"] = _ByToken.apply(probs, by_token, probs != 0)  # type: ignore[no-untyped-call]
    whole = own + total.to(own.device, own.dtype)
    if plain:
        return (whole, *output[1:])
    output["loss"] = whole
    return output


def pulled(y: Tensor, loss: Tensor, pull: Tensor) -> Tensor:
    """A layer's output y, whose gradient brings the layer's loss its own, `pull`."""
    out: Tensor = _Pull.apply(y, loss, pull)  # type: ignore[no-untyped-call]
    return out


class _Pull(torch.autograd.Function):
    """y, whose gradient brings a layer's loss its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, pull: Tensor) -> Tensor:
        ctx.pull = pull.to(loss.device, loss.dtype)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.pull, None


class _Once(torch.autograd.Function):
    """The losses for each way a training may take them, of which one counts: the first that a gradient comes by.

    These are the model's loss, the log-probabilities of trl's trainers, and what `multiflora.auxiliary_loss` gives
    out, which adds nothing to the value of a loss that has them already.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, found: Pass) -> tuple[Tensor, Tensor, Tensor]:
        ctx.found = found
        ctx.set_materialize_grads(False)
        return total.clone(), total.clone(), torch.zeros_like(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        in_loss, by_token, asked = grads
        found = in_loss
        if found is None:
            found = asked if by_token is None else by_token
            if by_token is not None and asked is not None:
                found = torch.where(by_token == 0, asked, by_token)
        if found is not None:
            ctx.found.reached.append(found != 0)
        return found, None


class _ByToken(torch.autograd.Function):
    """Log-probabilities, (rows, length), of which a mean over tokens is a loss: the losses get the weight of that mean.

    So trl's SFTTrainer takes its loss. Any other use of them, as a preference has, weighs tokens differently, and then
    the losses get nothing.
    """

    @staticmethod
    def forward(ctx: Any, probs: Tensor, total: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.like = total.dtype, total.device
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        most, least = grad.masked_fill(~counts, -torch.inf).max(), grad.masked_fill(~counts, torch.inf).min()
        is_mean = (most < 0) & (most - least <= -1e-3 * least)
        pull = torch.where(is_mean, -(grad * counts).sum(), 0.0)
        dtype, device = ctx.like
        return grad, pull.to(device, dtype), None


def _share(kwargs: Mapping[str, Any]) -> Tensor | float:
    """The batch's part of a step that has several: by its labels, as the model's own loss counts them."""
    whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if whole is None or not isinstance(labels, Tensor):
        return 1.0
    own = (labels[..., 1:] != _IGNORED).sum()
    return own / torch.as_tensor(whole, device=own.device).clamp(min=1)


def total_of(found: Pass) -> Tensor:
    """The mean over an adapter's layers, added up over adapters.

    Raises:
        AdapterError: They were computed without gradient although the model is training.
    """
    means: list[Tensor] = []
    for adapter, losses in found.losses.items():
        mean = torch.stack([one.to(losses[0].device) for one in losses]).mean()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not all(o.requires_grad for o in losses):
            if not found.with_gradient:
                raise AdapterError(
                    "The layers' losses carry no gradient although the model is training: the forward pass was made "
                    "without. Make it with gradients on (no torch.no_grad()), or leave auxiliary_loss out."
                )
            carrier = torch.zeros((), device=mean.device, requires_grad=True)
            carrier.register_hook(partial(_keep_pull, pull=found.pull, adapter=adapter, layers=len(losses)))  # type: ignore[no-untyped-call]
            mean = mean + carrier
        means.append(mean)
    return torch.stack([one.to(means[0].device) for one in means]).sum()


def _keep_pull(grad: Tensor, *, pull: dict[str, Tensor], adapter: str, layers: int) -> None:
    pull[adapter] = grad / layers
