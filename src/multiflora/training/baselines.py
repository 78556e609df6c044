r"""What peft's own methods, and LoSparse, need while they train, besides their config.

==============  =======================================================================================
LoRA+           an optimiser whose rate for B is a multiple of that for A (arXiv 2402.12354)
AdaLoRA         a schedule over the run's steps, and a loss that keeps its directions orthogonal
AdaLoRA,        checkpoints that hold what peft's own leave out: the importance of each direction;
learned         the network behind a prompt, of which peft saves only the result
prompts
LoSparse        a callback that takes rows away as its schedule says, and checkpoints that hold the
                rows' importance
==============  =======================================================================================

AdaLoRA's loss is peft's, :math:`w \cdot \operatorname{mean}_P \lVert P P^\top - I \rVert_F` over all A and
:math:`B^\top` (arXiv 2303.10512). peft adds it to a loss that the model computes from labels; ours is computed outside
of the model, so it is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiflora.compress.layer import compressed_layers
from multiflora.compress.losparse import Averages
from multiflora.compress.pruner import Pruner
from multiflora.errors import ConfigError
from multiflora.methods import METHODS, build_config
from multiflora.recipe import Recipe

__all__ = [
    "AdaLoraSchedule",
    "adalora_steps",
    "loraplus_optimizer",
    "orthogonality",
    "restore_training",
    "save_training",
    "schedules",
    "training_settings",
]

_STATE = "training_state.pt"


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the method's settings that act on the training alone, each with its default where none is given."""
    defaults = METHODS[recipe.method.name].training
    return {key: recipe.method.settings.get(key, value) for key, value in defaults.items()}


def loraplus_optimizer(
    model: PeftModel, optimizer: type[torch.optim.Optimizer], words: Mapping[str, Any], **own: Any
) -> Any:
    """Make LoRA+'s optimiser: peft's own, of the class that the recipe asks for.

    Args:
        model: A model with a LoRA adapter.
        optimizer: The class.
        words: Its arguments, the learning rate of A among them.
        own: ``loraplus_lr_ratio``, B's rate over A's, and ``loraplus_weight_decay``.
    """
    return create_loraplus_optimizer(model, optimizer, **words, **own)


def adalora_steps(settings: Mapping[str, Any], steps: int) -> dict[str, int]:
    """Return AdaLoRA's schedule for a run: ``total_step``, ``tinit``, ``tfinal`` and ``deltaT``.

    What a recipe does not say is a share of the run: a tenth of the steps at full rank, three tenths with the final
    ranks, and a hundred prunings between. The paper's schedules lie around these, task by task.

    Args:
        settings: The method's settings in the recipe.
        steps: Optimiser steps of the run.
    Raises:
        ConfigError: The run is too short for the schedule.
    Example:
        >>> adalora_steps({"tinit": 5}, 100)
        {'total_step': 100, 'tinit': 5, 'tfinal': 30, 'deltaT': 1}
    """
    usual = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "deltaT": max(1, steps // 100)}
    found = {"total_step": steps} | {key: int(settings.get(key, value)) for key, value in usual.items()}
    if found["tinit"] + found["tfinal"] >= steps:
        raise ConfigError(
            f"method.tinit is {found['tinit']} and method.tfinal is {found['tfinal']}, but the run has {steps} steps; "
            "adalora prunes in the steps between the two. Make them smaller, or train for longer."
        )
    return found


def schedules(model: Any, recipe: Recipe, steps: int) -> list[TrainerCallback]:
    """Return what acts between the steps of a run: AdaLoRA's schedule, LoSparse's pruning, or nothing.

    Args:
        model: The model, ready to be trained.
        recipe: Its method and settings.
        steps: Optimiser steps of the run.
    Raises:
        ConfigError: The run is too short for the schedule.
    """
    if compressed_layers(model):
        return [Pruner(model, build_config(recipe.method.name, recipe.method.settings))]
    return [AdaLoraSchedule(model, adalora_steps(recipe.method.settings, steps))] if _is_adalora(model) else []


class AdaLoraSchedule(TrainerCallback):
    """Has AdaLoRA weigh its directions after every optimiser step, and prune those that matter least.

    Args:
        model: A model with an AdaLoRA adapter.
        steps: See `adalora_steps`.
    """

    def __init__(self, model: PeftModel, steps: Mapping[str, int]) -> None:
        self.tuner: Any = model.base_model
        for key, value in steps.items():
            setattr(model.active_peft_config, key, value)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Weigh and prune: here the gradients of the step are still there, as peft asks."""
        # steps are counted from 1 here: the last one, where the ranks become final, comes even with tfinal = 0
        self.tuner.update_and_allocate(state.global_step + 1)


def orthogonality(model: Any) -> Tensor | float:
    """Return what AdaLoRA adds to the loss, its weight included; 0.0 for any other model."""
    if not _is_adalora(model):
        return 0.0
    weight_of_loss: float = model.active_peft_config.orth_reg_weight
    total: list[Tensor] = []
    for name, weight in model.named_parameters():
        if weight.numel() and f".{model.active_adapter}" in name and ("lora_A" in name or "lora_B" in name):
            rows = weight if "lora_A" in name else weight.t()
            total.append(torch.norm(rows @ rows.t() - torch.eye(len(rows), device=rows.device), p="fro"))
    return torch.stack(total).mean() * weight_of_loss


def save_training(model: Any, folder: Path) -> None:
    """Write what peft's own checkpoint leaves out beside it, for the methods that need it; see the module."""
    if not _keeps_own_state(model):
        return
    state: dict[str, Any] = {"weights": {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}}
    if _is_adalora(model):
        allocator = model.base_model.rankallocator
        state |= {key: getattr(allocator, key) for key in _IMPORTANCE}
        state["rank_pattern"] = model.active_peft_config.rank_pattern
    state["averages"] = {
        name: tuple(part.cpu() for part in layer.averages) for name, layer in compressed_layers(model).items()
    }
    torch.save(state, folder / _STATE)


def restore_training(model: Any, folder: Path) -> bool:
    """Read it again; says whether there was anything.

    Args:
        model: The model, with its adapter as it starts.
        folder: The checkpoint.
    """
    path = folder / _STATE
    if not _keeps_own_state(model) or not path.is_file():
        return False
    state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(state["weights"][name])
    if _is_adalora(model):
        for key in _IMPORTANCE:
            setattr(model.base_model.rankallocator, key, state[key])
        model.active_peft_config.rank_pattern = state["rank_pattern"]
    for name, layer in compressed_layers(model).items():
        layer.averages = Averages(*state["averages"][name])
    return True


_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _is_adalora(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == "ADALORA"


def _keeps_own_state(model: Any) -> bool:
    if isinstance(model, PeftModel):
        return bool(model.active_peft_config.is_prompt_learning) or _is_adalora(model)
    return bool(compressed_layers(model))
