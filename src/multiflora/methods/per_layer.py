"""How many heads a layer has, where layers differ: a number for each block, or for modules by name.

MoLA (arXiv 2402.08562) gives higher blocks more experts than lower ones, AlphaLoRA (arXiv 2410.10054) each block as
many as its weights ask for. A layer then reads the adapter's config through a `LayerConfig`, in which its own number
stands for the whole: shapes, starts, gates and counts follow without knowing of it.

==================  =================================================================================================
setting             number of a layer
==================  =================================================================================================
``heads_pattern``   that of the key that is its name, or the end of it, or a regular expression for that: as peft
                    reads ``rank_pattern``, but where two keys with different numbers match, it is refused
a list              the one at the number of its block, counted from 0: the first number that stands as a part of its
                    own in the layer's name (``model.layers.3.mlp.up_proj`` is in block 3), or the one after
                    ``layers_pattern`` where that is given
a single number     that
==================  =================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from peft.utils.other import get_pattern_key

from multiflora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerConfig", "at_layer", "at_most_heads", "block_problems", "differ_by_block", "head_counts"]


class LayerConfig:
    """An adapter's config as one layer reads it: a few settings are the layer's own, all others the config's, now."""

    def __init__(self, config: Any, heads: int) -> None:
        self.__dict__["_config"] = config
        self.__dict__["_heads"] = heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of a copy that is being made, and holds nothing yet
            raise AttributeError(name)
        config = self.__dict__["_config"]
        own: Mapping[str, Any] = config.with_heads(self.__dict__["_heads"])
        return own[name] if name in own else getattr(config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)


class _Block(NamedTuple):
    """Where a layer stands in a model's list of blocks."""

    blocks: str
    """Name of the list."""
    number: int


def head_counts(config: Any) -> list[int]:
    """Every number of heads that a layer of the adapter may have; none for methods whose layers have one."""
    given = getattr(config, config.heads_setting, None)
    numbers = [] if given is None else [given] if isinstance(given, int) else list(given)
    return [*numbers, *(config.heads_pattern or {}).values()]


def differ_by_block(config: Any) -> bool:
    """Whether there is a list with one number of heads for each block."""
    return isinstance(getattr(config, config.heads_setting, 1), list | tuple)


def at_layer(config: Any, name: str) -> Any:
    """The config as the layer of that name reads it; itself where all layers read the same.

    Raises:
        ConfigError: It says nothing of that layer.
    """
    patterns: dict[str, int] = config.heads_pattern or {}
    given: Any = getattr(config, config.heads_setting, None)
    if not patterns and (given is None or isinstance(given, int)):
        return config
    # every key by itself: a saved config does not keep their order
    found = {key: patterns[key] for key in patterns if get_pattern_key([key], name) == key}
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"heads_pattern gives {name} {' and '.join(map(str, found.values()))} heads, by its keys "
            f"{' and '.join(map(repr, found))}. Let one of them match it."
        )
    if found:
        return LayerConfig(config, next(iter(found.values())))
    return LayerConfig(config, given if isinstance(given, int) else _of_block(config, given, name))


def at_most_heads(config: Any) -> Any:
    """The config as the layer with the most heads reads it."""
    counts = head_counts(config)
    return LayerConfig(config, max(counts)) if len(counts) > 1 else config


def block_problems(config: Any, model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """What does not fit in a list with one number for each block and the model's blocks, a sentence each.

    Args:
        config: The adapter's.
        model: The model.
        names: The layers to adapt.
    """
    if not differ_by_block(config):
        return
    given, told = getattr(config, config.heads_setting), set()
    for name in names:
        block = _block(config, name)
        if block is None or block.blocks in told:
            continue
        told.add(block.blocks)
        blocks: Any = model.get_submodule(block.blocks)
        if hasattr(blocks, "__len__") and len(blocks) != len(given):
            yield (
                f"{config.heads_setting} has {len(given)} numbers, and {block.blocks} has {len(blocks)} blocks: give "
                "one number for each, or one for all and heads_pattern for those that differ."
            )


def _of_block(config: Any, given: list[int], name: str) -> int:
    block = _block(config, name)
    if block is None:
        raise ConfigError(
            f"{config.heads_setting} has a number for each block, and {name} stands in none (no part of its name is a "
            f"number). Give it one in heads_pattern={{{name.rpartition('.')[2]!r}: ...}}, or leave it out of "
            "target_modules."
        )
    if block.number >= len(given):
        raise ConfigError(
            f"{config.heads_setting} has {len(given)} numbers, and {name} stands in block {block.number}, counted from "
            "0. Give one number for each block."
        )
    return given[block.number]


def _block(config: Any, name: str) -> _Block | None:
    patterns = config.layers_pattern or "[^.]+"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"((?:.*?\.)??(?:{pattern}))\.(\d+)\.", f"{name}.")
        if found:
            return _Block(found[1], int(found[2]))
    return None
