"""From a folder or a name to a model that can be scored: a run of ours, any adapter, or any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from multiflora.adapter_folder import load_adapter
from multiflora.base_model import load_model, load_tokenizer
from multiflora.compress.saved import load_compressed
from multiflora.errors import AdapterError, ConfigError
from multiflora.files import user_path
from multiflora.methods import METHODS
from multiflora.recipe import ModelSpec, Recipe, load_recipe
from multiflora.training.precision import weight_dtype, weights_of
from multiflora.training.processes import own_device
from multiflora.training.quiet import quiet_libraries

__all__ = ["Loaded", "load_base", "load_target"]


class Loaded(NamedTuple):
    """A model in memory, and the recipe it comes from, if any."""

    model: Any
    tokenizer: Any
    recipe: Recipe | None


def load_target(target: str | Path) -> Loaded:
    """Load what a user names.

    Args:
        target: A run's output folder (its ``recipe.yaml`` names the base model), or a model's folder, hub id or
            ``embedded``.

    Raises:
        ConfigError: Nothing can be loaded from there.
        AdapterError: The folder's adapter does not fit.
    """
    folder = user_path(target)
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
        if METHODS[recipe.method.name].trains == "weights":
            _require(folder, "config.json", "model")
            trained = recipe.model.model_copy(update={"name": str(folder), "revision": None})
            return Loaded(*load_base(trained, weights_of(recipe)), recipe)
        if METHODS[recipe.method.name].trains == "factors":
            _require(folder, "losparse.json", "model")
            return _compressed(folder, recipe)
        base, tokenizer = load_base(recipe.model, weights_of(recipe))
        return Loaded(_with_adapter(base, folder), tokenizer, recipe)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds an adapter but no recipe.yaml, so its base model is not known for sure. Evaluate a run's "
            "output folder, or load model and adapter yourself: multiflora.evaluate(model, tokenizer, tasks)."
        )
    if (folder / "losparse.json").is_file():
        return _compressed(folder, None)
    model, tokenizer = load_base(ModelSpec(name=str(target)))
    return Loaded(model, tokenizer, None)


def load_base(spec: ModelSpec, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a model onto the machine's device, and its tokenizer.

    Args:
        spec: The model.
        dtype: Type of its weights; None: that of ``spec``, where it leaves it open the one the machine is fastest in.
    """
    with quiet_libraries():
        tokenizer = load_tokenizer(spec)
        model = load_model(spec, dtype or weight_dtype(spec.dtype, "auto"))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _compressed(folder: Path, recipe: Recipe | None) -> Loaded:
    """A model that LoSparse has made smaller, and its tokenizer, which lies beside it."""
    return Loaded(load_compressed(folder).to(own_device()), load_tokenizer(ModelSpec(name=str(folder))), recipe)


def _with_adapter(base: Any, folder: Path) -> Any:
    """Put the run's adapter on its base model."""
    _require(folder, "adapter_config.json", "adapter")
    return load_adapter(base, folder)


def _require(folder: Path, file: str, what: str) -> None:
    """Refuse a run's folder that lacks what its training was to write last."""
    if not (folder / file).is_file():
        raise AdapterError(
            f"{folder} has a recipe but no {what} ({file} is missing): its training did not finish. "
            f"Go on with `multiflora train {folder / 'recipe.yaml'} --resume`."
        )
