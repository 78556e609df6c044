"""The adapter: put on the base model as the recipe says, and saved so that it is whole and proven readable."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from multiflora.errors import AdapterError, ConfigError
from multiflora.methods import METHODS, build_config
from multiflora.recipe import Recipe
from multiflora.train.processes import is_first_process
from multiflora.train.sharded import adapter_tensors

__all__ = ["adapter_config", "add_adapter", "save_adapter"]


def add_adapter(model: Any, recipe: Recipe, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """Put the recipe's adapter on a base model; its start is drawn from the recipe's seed.

    Methods of ours learn the names of the tasks here, so that they can route by task.

    Args:
        model: The base model, which is not written to.
        recipe: Its ``method``, ``tasks``, ``seed`` and ``train.packing`` are read.
        low_cpu_mem_usage: Make the adapter on the meta device, where it has shapes and no values.
    Raises:
        ConfigError: The settings do not fit the method, the model or packing.
    """
    config = adapter_config(recipe)
    torch.manual_seed(recipe.seed)
    try:
        adapted: PeftModel = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except ValueError as error:
        if isinstance(error, AdapterError | ConfigError):
            raise
        raise ConfigError(
            f"method: {recipe.method.name} cannot be put on {type(model).__name__}: {error} "
            "Check method.target_modules."
        ) from error
    return adapted


def adapter_config(recipe: Recipe) -> Any:
    """Return the ``peft.PeftConfig`` of a recipe; cheap, so that a run is refused before it reads or scores anything.

    Args:
        recipe: Its ``method``, ``tasks`` and ``train.packing`` are read.
    Raises:
        ConfigError: A setting is unknown or out of range, or does not go with packing.
    """
    config = build_config(recipe.method.name, _settings(recipe))
    if recipe.train.packing and getattr(config, "balance_weight", None):
        raise ConfigError(
            f"train.packing is true and method.balance_weight is {config.balance_weight}; that loss balances the "
            "experts over rows of one example each, and packing puts several into a row. Set one of the two to "
            "false or 0."
        )
    return config


def _settings(recipe: Recipe) -> Mapping[str, Any]:
    """Return the method's settings with its task type, and for methods of ours the names of the tasks."""
    known: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if METHODS[recipe.method.name].module is not None:
        known |= {"num_tasks": len(recipe.tasks), "task_names": [task.name for task in recipe.tasks]}
    return known | recipe.method.settings


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter as safetensors, read it back, and only then put it in place.

    So ``folder`` never holds half an adapter, and never one that lacks a tensor, as saving under sharded training has
    produced elsewhere without a word. All processes call it, to hand in their parts; the first one writes.

    Args:
        model: A model with one adapter.
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
    Raises:
        AdapterError: What was read back is not what was saved.
    """
    held = adapter_tensors(model)
    if not is_first_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.save_pretrained(str(scratch), safe_serialization=True, state_dict=held)
        saved = load_file(scratch / "adapter_model.safetensors")
        _compare(saved, get_peft_model_state_dict(model, state_dict=held), folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (scratch / name).replace(folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compare(saved: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Check that every tensor of the adapter was saved, bit for bit."""
    missing = sorted(held.keys() - saved.keys())
    changed = sorted(name for name in held.keys() & saved.keys() if not torch.equal(saved[name], held[name].cpu()))
    if missing or changed or not saved:
        raise AdapterError(
            f"The adapter saved to {folder} differs from the trained one: {len(missing)} of {len(held)} tensors are "
            f"missing and {len(changed)} are changed (first: {(missing + changed or ['none were saved'])[0]}). It was "
            "not put in place. Save again, on another disk if it recurs."
        )
