"""Which methods learn by which objective: refused before anything is read, in a sentence each."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from multiflora.errors import ConfigError
from multiflora.methods import METHODS
from multiflora.recipe import Recipe
from multiflora.training.processes import is_sharded, uses_deepspeed

__all__ = ["check_objective", "check_output_layer"]

_CANNOT = {
    "lorahub": "weighs LoRAs by their loss on examples with answers",
    "losparse": "takes rows away by what the answers of the examples need",
}


def check_objective(recipe: Recipe) -> None:
    """Refuse a method that cannot learn by the recipe's objective, and processes that share a model's weights out.

    Args:
        recipe: Its ``method``, ``init_from`` and ``train.objective`` are read.

    Raises:
        ConfigError: They do not go together.
    """
    objective, name = recipe.train.objective, recipe.method.name
    if objective == "sft":
        return
    why = _CANNOT.get(name)
    if name == "loraga" and recipe.init_from is None:
        why = "takes its start from the gradient of examples with answers (with init_from it goes on from an adapter)"
    if why is not None:
        raise ConfigError(
            f"train.objective is {objective!r}, but {name} {why}. Take another method, e.g. lora or rlora, or "
            "objective: sft."
        )
    if is_sharded() or uses_deepspeed():
        raise ConfigError(
            f"train.objective is {objective!r}, and the run was launched for FSDP or DeepSpeed, which divide what the "
            "reference and the answers need whole. Launch it with DDP (torchrun, configs/accelerate/ddp_8gpu.yaml)."
        )


def check_output_layer(model: Any, recipe: Recipe) -> None:
    """Refuse an adapter on the output layer, past which trl reads the probabilities.

    Args:
        model: The model with the recipe's adapter; shapes suffice.
        recipe: Its ``train.objective`` is read.

    Raises:
        ConfigError: There is one.
    """
    objective = recipe.train.objective
    if objective != "sft" and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"method.target_modules names the output layer ({METHODS[recipe.method.name].title} is on it), and "
            f"train.objective is {objective!r}, which reads that layer's own weight, so what is trained there would "
            "never be learned. Leave the output layer (lm_head) out."
        )
