"""From a method's name, as recipes have it, to what it is and to its config.

To add a method, write its file beside these; see CONTRIBUTING.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from multiflora.errors import ConfigError
from multiflora.methods.cards import METHODS, MethodCard
from multiflora.methods.settings import setting_problems

__all__ = ["METHODS", "MethodCard", "build_config", "describe", "merges", "settings_of"]

# of peft's own methods: what `multiflora.adapter_folder` refuses to load, so that nothing should be trained with it;
# our config classes say themselves what they do not take
_NOT_FROM_A_FILE = ("megatron_config", "layer_replication")


def describe(name: str) -> Any:
    """What a method is, as a value: a :class:`~multiflora.methods.base.Method`, or a baseline's description.

    Raises:
        ConfigError: No such method (with the nearest names).
    """
    from multiflora.suggest import did_you_mean

    if name not in METHODS:
        raise ConfigError(f"method.name is {name!r}; there is no such method; {did_you_mean(name, METHODS)}")
    module = METHODS[name].module
    if module is not None:
        return importlib.import_module(module).METHOD
    return importlib.import_module("multiflora.methods.baselines").BASELINES[name]


def merges(name: str, settings: Mapping[str, Any]) -> str:
    """Whether the update that these settings train is one matrix: "exactly", "per task" or "no ...".

    It is what the method's card says, unless the settings decide it.

    Example:
        >>> merges("parts", {"gate": "task"})
        'per task'
    """
    card = METHODS[name]
    if not card.merges.startswith("depends"):
        return card.merges
    found: str = describe(name).of(build_config(name, settings)).merges()
    return found


def build_config(name: str, settings: Mapping[str, Any]) -> Any:
    """The peft config of a method from plain settings, with every unknown word refused.

    Args:
        name: A key of :data:`METHODS`.
        settings: Keyword arguments of its config class.

    Returns:
        A ``peft.PeftConfig``; for LoSparse a `multiflora.compress.spec.CompressSpec`; None for full fine-tuning.

    Raises:
        ConfigError: No such method or setting (with the nearest names), or a value out of range.

    Example:
        >>> build_config("rlora", {"r": 4, "num_heads": 5}).num_heads
        5
    """
    from multiflora.suggest import did_you_mean

    known = settings_of(name)
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigError(
            " ".join(f"method.{key} is not a setting of {name}; {did_you_mean(str(key), known)}" for key in unknown[:3])
            + (f" And {len(unknown) - 3:,} more are not." if len(unknown) > 3 else "")
        )
    card = METHODS[name]
    if card.config is not None:
        problems = list(setting_problems(_config_class(card), settings, extra=card.training))
        if problems:
            raise ConfigError(" ".join(f"method.{problem}" for problem in problems))
        refused = [key for key in _NOT_FROM_A_FILE if card.module is None and settings.get(key)]
        if refused:
            raise ConfigError(
                f"method.{refused[0]} is not available: an adapter with it is not loaded again, as it has peft import "
                "code or copy the model's layers. Leave it out."
            )
    for key, value in card.preset.items():
        if settings.get(key, value) != value:
            raise ConfigError(
                f"method.{key} is {settings[key]!r}, but {name} is peft's {card.config} with {key}={value!r}; "
                "remove it, or choose another method."
            )
    if card.module is None:
        describe(name).check({**card.training, **settings})
    if card.config is None:
        return describe(name).plan(settings)
    own = {key: value for key, value in settings.items() if key not in card.training}
    given = {**card.defaults, **card.preset, **own}
    try:
        if card.module is None:
            given = describe(name).complete(given)
        return _config_class(card)(**given)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"method: {error}") from error


def settings_of(name: str) -> list[str]:
    """Every setting a method has, its own and the shared ones.

    Raises:
        ConfigError: No such method (with the nearest names).
    """
    import dataclasses

    from multiflora.suggest import did_you_mean

    if name not in METHODS:
        raise ConfigError(f"method.name is {name!r}; there is no such method; {did_you_mean(name, METHODS)}")
    # a few of peft's fields are not for users: they say which class this is, or what was loaded from where
    internal = {
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "inference_mode",
        "runtime_config",
    }
    card = METHODS[name]
    if card.module is None:
        internal |= describe(name).unused
    found = dataclasses.fields(_config_class(card)) if card.config else ()
    return [*card.training, *(item.name for item in found if item.init and item.name not in internal)]


def _config_class(card: MethodCard) -> Any:
    import peft

    assert card.config is not None  # asked only of methods that have one
    return getattr(importlib.import_module(card.module) if card.module else peft, card.config)
