"""LoSparse, and what it came to: the main job, then sizes and the time of a forward pass beside the original's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multiflora.compress.layer import compressed_layers
from multiflora.errors import ConfigError
from multiflora.evaluation.load import load_base, load_target
from multiflora.evaluation.results import Results
from multiflora.evaluation.table import results_table
from multiflora.files import write_json
from multiflora.jobs.train import train
from multiflora.recipe import Recipe, recipe_from
from multiflora.training.adapter import parameter_counts
from multiflora.training.precision import weights_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Compressed", "compress"]

_ROUNDS = 5
_TOKENS = 128


@dataclass(frozen=True)
class Compressed:
    """What a compression came to."""

    output: Path
    """Folder of the run; `multiflora.load_compressed` and `multiflora evaluate` read it."""
    parameters: Mapping[str, int]
    """Numbers stored ``before`` and ``after``; ``layers_before`` and ``layers_after``: the compressed layers alone."""
    seconds: Mapping[str, float]
    """A forward pass of one row of 128 tokens ``before`` and ``after``: medians of rounds that took turns."""
    rows_left: float
    """Share of S's rows that is left."""
    base: Results | None
    """Scores of the original model; None where the recipe does not ask for them."""
    compressed: Results
    """Scores of the model that was written, read back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "output": str(self.output)}

    def table(self) -> Table:
        """Every task's score before and after."""
        return results_table(self.compressed, self.base)

    def lines(self) -> list[str]:
        """Size and speed, in words."""
        size, ms = self.parameters, {when: seconds * 1e3 for when, seconds in self.seconds.items()}
        return [
            f"Parameters: {size['before']:,} before, {size['after']:,} after ({size['after'] / size['before']:.1%}); "
            f"linear layers alone {size['layers_after'] / size['layers_before']:.1%}.",
            f"A forward pass of {_TOKENS} tokens: {ms['before']:.1f} ms before, {ms['after']:.1f} ms after.",
        ]


def compress(
    source: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, quiet: bool = False
) -> Compressed:
    """Train a recipe whose method is ``losparse``, and measure what came of it beside the original model.

    Every linear layer but the output head becomes L R + S; all three are trained and rows of S are taken away, see
    `multiflora.compress.losparse`. The training is `multiflora.train`'s; this adds ``compression.json`` to its folder.

    Args:
        source: A recipe, a mapping with its keys, or the path of a YAML file.
        overrides: ``key.path=value`` items, e.g. ``method.keep=0.1``.
        quiet: Show no progress.

    Returns:
        Sizes, times and scores; the model is in the recipe's output folder.

    Raises:
        ConfigError: The recipe has another method, or problems, or its output folder holds something already.
        DataError: A task's data cannot be used.

    Example:
        >>> compress("small.yaml").parameters  # doctest: +SKIP
    """
    recipe = recipe_from(source, overrides)
    if recipe.method.name != "losparse":
        raise ConfigError(
            f"method is {recipe.method.name}, which makes no model smaller; `multiflora compress` takes recipes with "
            "method: losparse. Train this one with `multiflora train`."
        )
    scores = train(recipe, quiet=quiet).results
    small = load_target(recipe.output).model
    base, _ = load_base(recipe.model, weights_of(recipe))
    layers = compressed_layers(small).values()
    found = Compressed(
        output=recipe.output,
        parameters={
            "before": parameter_counts(base)[1],
            "after": parameter_counts(small)[1],
            "layers_before": sum(layer.in_features * layer.out_features for layer in layers),
            "layers_after": sum(layer.numbers() for layer in layers),
        },
        seconds=_side_by_side(base.eval(), small),
        rows_left=sum(len(layer.rows) for layer in layers) / sum(layer.out_features for layer in layers),
        base=scores["base"],
        compressed=scores["adapted"],
    )
    write_json(recipe.output / "compression.json", found.to_dict())
    return found


@torch.inference_mode()
def _side_by_side(base: Any, small: Any) -> dict[str, float]:
    """Seconds of a forward pass: the two take turns, so that what else the machine does falls on both."""
    ids = torch.arange(_TOKENS, device=base.device).remainder(base.config.vocab_size).unsqueeze(0)
    taken: dict[str, list[float]] = {"before": [], "after": []}
    for turn in range(_ROUNDS + 1):
        for name, model in (("before", base), ("after", small)):
            start = time.perf_counter()
            model(input_ids=ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}
