"""Every method, as a literal table. This file imports no torch, so that ``multiflora methods`` answers at once.

To add a method: write its file beside these and add its card here; see CONTRIBUTING.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multiflora.errors import ConfigError

__all__ = ["METHODS", "MethodCard", "build_config", "describe", "settings_of"]


@dataclass(frozen=True)
class MethodCard:
    """What a person needs to know to choose a method."""

    name: str
    """The word recipes use."""
    title: str
    line: str
    """The idea in one line."""
    paper: str
    settings: tuple[str, ...]
    """Its own settings, besides the shared ones (r, lora_alpha, target_modules, ...)."""
    merges: str
    """Whether the trained update is one weight matrix."""
    config: str
    """Name of its config class."""
    module: str | None = None
    """Where it lives here; None for peft's own methods."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """What makes peft's class this method, e.g. ``{"use_dora": True}``."""
    learning_rate: float = 2e-4
    """Where a search for the learning rate starts: what the method is usually trained with."""


METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        MethodCard(
            name="lora",
            title="LoRA",
            line="One low-rank update shared by all tasks: the baseline every other method has to beat.",
            paper="arXiv 2106.09685",
            settings=(),
            merges="exactly",
            config="LoraConfig",
        ),
        MethodCard(
            name="multilora",
            title="MultiLoRA",
            line="n parallel LoRAs with learned scales that start at zero: many directions share the work.",
            paper="arXiv 2311.11501",
            settings=("num_modules", "scale_shape", "use_alpha"),
            merges="exactly",
            config="MultiLoraConfig",
            module="multiflora.methods.multilora",
        ),
        MethodCard(
            name="rlora",
            title="R-LoRA",
            line="One shared A, random heads B, a token router and dropout per head: heads learn different tasks.",
            paper="arXiv 2502.15455",
            settings=(
                "num_heads",
                "head_dropout",
                "gamma",
                "router_init",
                "top_k",
                "router_balance_loss",
                "router_z_loss",
            ),
            merges="no (token router)",
            config="RLoraConfig",
            module="multiflora.methods.rlora",
        ),
        MethodCard(
            name="mlora",
            title="M-LoRA",
            line="R-LoRA without its router: random heads averaged or summed.",
            paper="arXiv 2508.05078",
            settings=("num_heads", "head_dropout", "gamma", "reduce"),
            merges="exactly",
            config="MLoraConfig",
            module="multiflora.methods.mlora",
        ),
        MethodCard(
            name="hydralora",
            title="HydraLoRA",
            line="One shared A, heads B that start at zero, a token router.",
            paper="arXiv 2404.19245",
            settings=("num_heads", "top_k", "router_balance_loss", "router_z_loss"),
            merges="no (token router)",
            config="HydraLoraConfig",
            module="multiflora.methods.hydralora",
        ),
        MethodCard(
            name="moelora",
            title="MOELoRA",
            line="Low-rank experts blended by the task alone.",
            paper="arXiv 2310.18339",
            settings=("num_experts", "task_embedding_dim"),
            merges="per task",
            config="MoeLoraConfig",
            module="multiflora.methods.moelora",
        ),
        MethodCard(
            name="loramoe",
            title="LoRAMoE",
            line="Whole LoRA experts behind a dense token router, with a localized balance loss.",
            paper="arXiv 2312.09979",
            settings=(
                "num_experts",
                "balance_weight",
                "balance_delta",
                "knowledge_tasks",
                "top_k",
                "router_balance_loss",
                "router_z_loss",
            ),
            merges="no (token router)",
            config="LoraMoeConfig",
            module="multiflora.methods.loramoe",
        ),
        MethodCard(
            name="mtllora",
            title="MTL-LoRA",
            line="A learned matrix per task between a shared A and heads blended by the task.",
            paper="arXiv 2410.09437",
            settings=("num_heads", "temperature", "task_matrix"),
            merges="per task",
            config="MtlLoraConfig",
            module="multiflora.methods.mtllora",
        ),
        MethodCard(
            name="mixlora",
            title="MixLoRA's routing",
            line="Whole LoRA experts of which a token router picks the best k, with a load-balance loss.",
            paper="arXiv 2404.15159",
            settings=("num_experts", "top_k", "router_balance_loss", "router_z_loss"),
            merges="no (token router)",
            config="MixLoraConfig",
            module="multiflora.methods.mixlora",
        ),
        MethodCard(
            name="alignlora",
            title="Align-LoRA",
            line="One LoRA, and a loss that keeps the tasks' A x alike.",
            paper="arXiv 2508.05078",
            settings=("align_weight",),
            merges="exactly",
            config="AlignLoraConfig",
            module="multiflora.methods.alignlora",
        ),
    )
}


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


def build_config(name: str, settings: Mapping[str, Any]) -> Any:
    """The peft config of a method from plain settings, with every unknown word refused.

    Args:
        name: A key of :data:`METHODS`.
        settings: Keyword arguments of its config class.

    Returns:
        A ``peft.PeftConfig``.

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
            " ".join(f"method.{key} is not a setting of {name}; {did_you_mean(key, known)}" for key in unknown)
        )
    preset = METHODS[name].preset
    for key, value in preset.items():
        if settings.get(key, value) != value:
            raise ConfigError(
                f"method.{key} is {settings[key]!r}, but {name} is peft's {METHODS[name].config} with {key}={value!r}; "
                "remove it, or choose another method."
            )
    config_class = _config_class(METHODS[name])
    try:
        return config_class(**{**preset, **settings})
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
    found = dataclasses.fields(_config_class(METHODS[name]))
    return [item.name for item in found if item.init and item.name not in internal]


def _config_class(card: MethodCard) -> Any:
    import peft

    return getattr(importlib.import_module(card.module) if card.module else peft, card.config)
