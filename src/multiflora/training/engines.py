"""Whether the engine that a run was launched for is there, and can train the recipe's method."""

from __future__ import annotations

import importlib.util

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.methods import METHODS
from multiflora.recipe import MethodSpec, Recipe
from multiflora.training.processes import is_sharded, uses_deepspeed

__all__ = ["require_engine"]


def require_engine(recipe: Recipe) -> None:
    """Refuse to train without an engine that was asked for, or a method that the engine leaves without its tensors.

    Args:
        recipe: Its ``method`` is read.
    Raises:
        EnvironmentProblem: DeepSpeed was asked for and is not installed.
        ConfigError: The method looks at its tensors where the engine has divided or freed them.
    """
    if uses_deepspeed() and importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentProblem(
            "This run was launched for DeepSpeed, which is not installed: pip install 'multiflora[deepspeed]'. Or "
            "launch it for another engine (configs/accelerate has an example of each)."
        )
    engine = "DeepSpeed" if uses_deepspeed() else "FSDP"
    why = _needs_gradients(recipe.method) if uses_deepspeed() or is_sharded() else None
    why = why or (_needs_whole_weights(recipe.method) if is_sharded() else None)
    if why is not None:
        raise ConfigError(
            f"method.name is {recipe.method.name}, which {why}; {engine} does not have them whole there. Launch this "
            "run with DDP (torchrun, or configs/accelerate/ddp_8gpu.yaml), or choose another method."
        )


def _needs_gradients(method: MethodSpec) -> str | None:
    """Why no engine but DDP will do; under ZeRO-2, too, gradients belong to DeepSpeed."""
    return {
        "adalora": "ranks its directions by their gradients after each step",
        "loraga": "takes its start from the gradients of the first batches",
    }.get(method.name)


def _needs_whole_weights(method: MethodSpec) -> str | None:
    """Why parameters may not be divided."""
    if method.name == "deltalora" and method.settings.get("start_step"):
        return f"with start_step {method.settings['start_step']} copies its weights between the steps"
    if METHODS[method.name].trains == "prompt":
        return "reads the weights of its virtual tokens outside of all layers"
    return None
