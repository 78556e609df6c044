"""What a compression is, in YAML: a recipe with a section ``compress`` in place of ``method``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from multiflora.errors import ConfigError
from multiflora.recipe import Recipe, override, recipe_from
from multiflora.schema import Strict, build
from multiflora.yaml_file import read_yaml

__all__ = ["CompressSpec", "Compression", "load_compression"]


class CompressSpec(Strict):
    """The section ``compress`` of a recipe: LoSparse's settings (arXiv 2306.11222)."""

    low_rank: float = Field(default=0.05, gt=0, lt=1)
    """Share of a weight's numbers that its low-rank part has."""
    keep: float = Field(default=0.15, ge=0, lt=1)
    """Share of the numbers of S, in whole rows, that is left in the end; layers compete for them."""
    start: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps before anything is taken away."""
    end: float = Field(default=0.3, ge=0, lt=1)
    """Share of the steps after all is taken away."""
    every: int = Field(default=10, gt=0)
    """Steps from one pruning to the next, until all is taken away."""
    beta1: float = Field(default=0.85, ge=0, lt=1)
    """Memory of the running mean of the importance."""
    beta2: float = Field(default=0.85, ge=0, lt=1)
    """Memory of the running mean of its uncertainty."""

    @model_validator(mode="after")
    def _fits(self) -> CompressSpec:
        if self.low_rank + self.keep >= 1:
            raise ValueError(
                f"low_rank is {self.low_rank} and keep is {self.keep}; together they must be below 1, or nothing is "
                "saved."
            )
        if self.start + self.end >= 1:
            raise ValueError(f"start is {self.start} and end is {self.end}; together they must be below 1.")
        return self


class Compression(Strict):
    """A recipe, and how its model is compressed while it trains."""

    recipe: Recipe
    """Model, tasks and training; its method is full fine-tuning, for its learning rate."""
    compress: CompressSpec
    """How."""


def load_compression(
    source: Compression | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> Compression:
    """Read a compression.

    Args:
        source: A compression, a mapping with a recipe's keys and ``compress``, or the path of a YAML file.
        overrides: ``key.path=value`` items, as for a recipe: ``compress.keep=0.1``.

    Raises:
        ConfigError: The file is missing or not YAML, or it has problems: all of them are listed.
    """
    if isinstance(source, Compression):
        return source
    where, base, plain = "compression", Path.cwd(), source
    if isinstance(source, str | Path):
        where, base, plain = str(source), Path(source).absolute().parent, read_yaml(Path(source))
    if not isinstance(plain, Mapping) or not isinstance(plain.get("compress"), Mapping):
        raise ConfigError(
            f"{where} has no section 'compress'; expected a recipe with one more key, "
            "e.g. compress: {low_rank: 0.05, keep: 0.15}."
        )
    for item in overrides:
        plain = override(plain, item)
    spec = build(CompressSpec, plain["compress"], where=f"{where}, compress", base=base)
    rest = {key: value for key, value in plain.items() if key != "compress"}
    if "method" in rest:
        raise ConfigError(
            f"{where} has both 'method' and 'compress'; a compression trains the weights, not an adapter."
        )
    return Compression(recipe=recipe_from({**rest, "method": "full"}, where=where, base=base), compress=spec)
