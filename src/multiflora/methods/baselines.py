r"""peft's own methods, as far as they need more than a config: the baselines every comparison has to have.

Each is one :class:`Baseline`: which tensors it trains (so that ranks can be solved for), and what it needs besides
``get_peft_model`` to do what its paper does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["BASELINES", "Baseline"]

Shapes = Callable[[Any, int, int, int], dict[str, tuple[int, ...]]]


def _pair(config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """LoRA's two factors."""
    return {"A": (r, d_in), "B": (d_out, r)}


def _pair_and_magnitude(config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """DoRA: the factors, and the length of each row of the weight."""
    return {**_pair(config, r, d_in, d_out), "magnitude": (d_out,)}


def _triplets(config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """AdaLoRA: the factors, and a singular value for each direction."""
    return {**_pair(config, r, d_in, d_out), "singular_values": (r, 1)}


@dataclass(frozen=True)
class Baseline:
    """One of peft's methods, as a value."""

    name: str
    """The word recipes use."""
    shapes: Shapes | None = None
    """(config, r, d_in, d_out) -> the trainable tensors of one adapted layer; None where no rank decides them."""
    rank_key: str = "r"
    """Name of the setting that is the rank."""


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("lora", _pair),
        Baseline("loraplus", _pair),
        Baseline("rslora", _pair),
        Baseline("dora", _pair_and_magnitude),
        Baseline("pissa", _pair),
        Baseline("adalora", _triplets, rank_key="init_r"),
        Baseline("ia3"),
        Baseline("prompt"),
        Baseline("prefix"),
        Baseline("ptuning"),
        Baseline("full"),
    )
}
