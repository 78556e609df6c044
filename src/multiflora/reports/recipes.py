"""A recipe as it is shown: without secrets, and without the folders of the machine it ran on."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from multiflora.recipe import TrainSpec
from multiflora.redact import without_home, without_secrets
from multiflora.yaml_file import dump_yaml, parse_yaml

__all__ = ["length_of", "shown_recipe"]

# where a recipe may name a file or a folder
_PLACES = {"output", "init_from", "folder", "train", "validation", "test", "path", "name", "data_files", "model"}


def shown_recipe(text: str) -> str:
    """Shorten paths elsewhere to their last part: where things lie on another machine is its owner's business.

    Args:
        text: A recipe as YAML, its paths relative to its folder.

    Example:
        >>> print(shown_recipe("model: ../../models/small"), end="")
        # paths outside this folder are shortened to their last part
        model: '.../small'
    """
    plain = parse_yaml(without_home(without_secrets(text)), "recipe")
    short = _shortened(plain, False)
    note = "# paths outside this folder are shortened to their last part\n" if short != plain else ""
    return note + dump_yaml(short)


def length_of(train: TrainSpec) -> str:
    """How long a training is, in words.

    Example:
        >>> length_of(TrainSpec(max_steps=60)), length_of(TrainSpec(epochs=1))
        ('60 steps', '1 epoch')
    """
    if train.max_steps:
        return f"{train.max_steps:,} step{'' if train.max_steps == 1 else 's'}"
    return f"{train.epochs:g} epoch{'' if train.epochs == 1 else 's'}"


def _shortened(node: Any, is_place: bool) -> Any:
    if isinstance(node, dict):
        return {key: _shortened(value, key in _PLACES) for key, value in node.items()}
    if isinstance(node, list):
        return [_shortened(value, is_place) for value in node]
    if is_place and isinstance(node, str) and node.startswith(("../", "/", "~")):
        return f".../{PurePath(node).name}"
    return node
