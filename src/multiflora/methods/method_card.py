"""A method's card: what `multiflora methods` tells of it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["MethodCard"]


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
    config: str | None
    """Name of its config class; None where the weights themselves are trained, which needs none."""
    module: str | None = None
    """Where it lives here, filled in where the card is read; None for peft's own methods."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """What makes peft's class this method, e.g. ``{"use_dora": True}``."""
    learning_rate: float = 2e-4
    """What the method is usually trained with: taken where a recipe gives none, and where a search starts."""
    trains: Literal["adapter", "prompt", "weights", "factors"] = "adapter"
    """Small matrices beside linear layers, virtual tokens before the input, every weight of the model, or factors in
    the weights' place, of which a smaller model is made."""
    target_modules: str | None = "all-linear"
    """The modules that a recipe means when it names none; None: peft's own choice, or there is no such setting."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings that peft's class leaves open and that must have a value."""
    experts: str = "no"
    """Whether the fused experts of a mixture can be adapted, and how."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings that act on the training alone, with their defaults; the config class has none of them."""
