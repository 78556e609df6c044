"""Whether a setting's value is of its field's type and within its range: one rule for our methods and for peft's.

peft's config classes are plain dataclasses, which take anything: ``r: "4"`` or ``lora_alpha: [1]`` would only fail deep
within a layer, and an alpha of infinity not at all. The types are those that the class is annotated with; the ranges
stand here, by the settings' names, which mean the same in every method.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Set
from enum import Enum
from typing import Any

from multiflora.suggest import shown

__all__ = ["setting_problems"]

MANY = 1_000_000
"""Largest rank, width, length, scale and weight: far beyond all that was ever of use."""
HEADS = 10_000
"""Most branches of a layer, each of which takes a few operations of its own."""
STEPS = 10**12
"""Most steps of a training."""


@dataclasses.dataclass(frozen=True)
class _Range:
    """Numbers that a setting can have."""

    least: float
    most: float
    open: bool = False
    """Whether ``least`` itself is left out."""
    below: bool = False
    """Whether ``most`` itself is left out."""

    def holds(self, value: float) -> bool:
        low = value > self.least if self.open else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def words(self, is_whole: bool) -> str:
        if self.below:
            return f"in {'(' if self.open else '['}{self.least:g}, {self.most:g})"
        number = "a whole number" if is_whole else "a number"
        return f"{number} {'above' if self.open else 'of at least'} {self.least:g}, and at most {self.most:,.0f}"


def _ranges(found: _Range, names: str) -> dict[str, _Range]:
    return dict.fromkeys(names.split(), found)


_RANGES: Mapping[str, _Range] = {
    **_ranges(_Range(1, MANY), "r init_r target_r rank_pattern num_virtual_tokens encoder_hidden_size deltaT"),
    **_ranges(_Range(1, MANY), "task_embedding_dim gradient_batches qalora_group_size examples budget"),
    **_ranges(
        _Range(1, HEADS),
        "num_heads num_stems num_cores num_experts num_modules heads_pattern num_tasks top_k encoder_num_layers",
    ),
    **_ranges(_Range(0, STEPS), "tinit tfinal start_step total_step"),
    **_ranges(_Range(0, 2**63 - 1), "init_seed layers_to_transform trainable_token_indices alora_invocation_tokens"),
    **_ranges(_Range(0, MANY, open=True), "lora_alpha alpha_pattern gamma temperature loraplus_lr_ratio update_ratio"),
    **_ranges(_Range(0, MANY), "router_z_loss router_balance_loss balance_weight align_weight orth_reg_weight"),
    **_ranges(_Range(0, MANY), "orthogonality_loss"),
    **_ranges(_Range(-MANY, MANY), "router_entropy_loss"),
    **_ranges(_Range(0, 1, below=True), "lora_dropout head_dropout encoder_dropout balance_delta"),
    **_ranges(_Range(0, 1, open=True, below=True), "beta1 beta2"),
}
# what peft's annotations leave open: it calls alpha whole and takes any number, and has mappings of anything
_HINTS: Mapping[str, Any] = {
    "lora_alpha": float,
    "alpha_pattern": dict[str, float],
    "rank_pattern": dict[str, int],
    "bias": typing.Literal["none", "all", "lora_only"],
}
_NITER = re.compile(r"pissa_niter_\d{1,4}")


def setting_problems(
    config_class: type, settings: Mapping[str, Any], *, extra: Mapping[str, Any] | None = None, is_saved: bool = False
) -> Iterator[str]:
    """Say what is wrong with settings, a sentence each; names that the class does not have are not looked at.

    Args:
        config_class: The method's config class, ours or peft's.
        settings: Values by name.
        extra: Settings that the class does not have, with their defaults, whose types are theirs.
        is_saved: The settings come from an ``adapter_config.json``, where objects have become mappings.

    Example:
        >>> from multiflora.methods.rlora import RLoraConfig
        >>> list(setting_problems(RLoraConfig, {"r": "4"}))
        ["r is '4'; it must be a whole number of at least 1, and at most 1,000,000."]
    """
    hints = typing.get_type_hints(config_class) | {name: type(value) for name, value in (extra or {}).items()}
    defaults = {item.name: item.default for item in dataclasses.fields(config_class)}
    masks = {"rank_pattern"} if "init_r" in hints else set()  # AdaLoRA's, where others have ranks
    for name, value in settings.items():
        if name not in hints or (value is None and (defaults.get(name, 0) is None or _fits(None, hints[name]))):
            continue
        hint = hints[name] if name in masks else _HINTS.get(name, hints[name])
        if _of_objects(hint):
            if value and not is_saved and not _fits(value, hint):
                yield f"{name} is {shown(value)}; it takes an object of Python, which a file cannot hold. Leave it out."
        elif _is_mapping(hint) and isinstance(value, Mapping):
            of_keys, of_values = typing.get_args(hint)
            for key, inner in value.items():
                if not _fits(key, of_keys):
                    yield f"{name} has the key {shown(key)}; it must be {_words(of_keys, None)}."
                yield from _problem(f"{name}[{shown(key)}]", inner, of_values, _RANGES.get(name))
        elif not (name == "init_lora_weights" and isinstance(value, str) and _NITER.fullmatch(value)):
            yield from _problem(name, value, hint, _RANGES.get(name))


def _problem(name: str, value: Any, hint: Any, bounds: _Range | None) -> Iterator[str]:
    if not _fits(value, hint) or (bounds and not all(bounds.holds(number) for number in _numbers(value))):
        yield f"{name} is {shown(value)}; it must be {_words(hint, bounds)}."


def _is_mapping(hint: Any) -> bool:
    origin: Any = typing.get_origin(hint)
    return origin is dict


def _of_objects(hint: Any) -> bool:
    """Whether a setting takes an object of a class of peft's, such as ``ArrowConfig``."""
    return dataclasses.is_dataclass(hint) or any(_of_objects(inner) for inner in typing.get_args(hint))


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple | Set):
        for inner in value:
            yield from _numbers(inner)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as it is written in an annotation."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin is list or origin is tuple:
        kinds = [each for each in inner if each is not Ellipsis]
        is_list = isinstance(value, list | tuple | Set)
        return is_list and all(any(_fits(item, kind) for kind in kinds) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint) or value in [each.value for each in hint]
    return isinstance(value, Mapping if hint is dict else hint)


_SIMPLE = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping"}


def _words(hint: Any, bounds: _Range | None) -> str:
    """An annotation and a range in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each, bounds) for each in inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is list or origin is tuple:
        return f"a list, of {_words(inner[0], bounds)} each"
    if origin is dict:
        return f"a mapping of names, to {_words(inner[1], bounds)} each"
    if bounds and hint in (int, float):
        return bounds.words(hint is int)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(each.value) for each in hint)}"
    return _SIMPLE.get(hint, getattr(hint, "__name__", str(hint)))
