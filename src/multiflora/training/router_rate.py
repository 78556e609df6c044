"""A learning rate of its own for the token routers: heads may then divide the tasks before they have learnt them."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from multiflora.errors import ConfigError
from multiflora.methods.gates import TOKEN_ROUTERS
from multiflora.methods.layer_pass import BranchLayer

__all__ = ["give_routers_their_rate"]


def give_routers_their_rate(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Move the trained token routers into groups of their own, with ``ratio`` times the learning rate.

    Args:
        optimizer: Before its first step and before its schedule is made; changed in place.
        model: The model with its adapter.
        ratio: The routers' rate over that of the other parameters.

    Raises:
        ConfigError: The model has no token router.
    """
    routers = {
        id(part)
        for layer in model.modules()
        if isinstance(layer, BranchLayer)
        for name in layer.configs
        for kind, part in layer.parts(name).items()
        if kind in TOKEN_ROUTERS and part.requires_grad
    }
    if not routers:
        raise ConfigError(
            f"train.router_lr_ratio is {ratio:g}, but this method has no token router. Remove the key, or take a "
            "method with one, e.g. rlora or hydralora."
        )
    for group in list(optimizer.param_groups):
        own = [part for part in group["params"] if id(part) in routers]
        if own:
            group["params"] = [part for part in group["params"] if id(part) not in routers]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
