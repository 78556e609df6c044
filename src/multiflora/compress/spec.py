"""LoSparse's settings (arXiv 2306.11222), as a recipe has them beside ``method: losparse``. Needs no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from multiflora.schema import Strict

__all__ = ["CompressSpec"]


class CompressSpec(Strict):
    """How a model is made smaller while it trains."""

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
    beta2: float = Field(default=1.0, ge=0, le=1)
    """Memory of the running mean of its uncertainty; 1, as in the published script: importance alone counts."""

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
