"""A recipe in, a smaller model out: compressed while it trains, scored before and after, timed beside the original."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multiflora.base_model import load_model, load_tokenizer
from multiflora.compress.layer import compressed_layers, sparsify
from multiflora.compress.pruner import Pruner
from multiflora.compress.saved import load_compressed, save_compressed
from multiflora.compress.spec import Compression, load_compression
from multiflora.data.prepare import encode_tasks
from multiflora.evaluate import Results, evaluate
from multiflora.evaluate.table import results_table
from multiflora.export.stage import check_free, staged
from multiflora.files import write_json, write_text
from multiflora.redact import refuse_secrets
from multiflora.train.fit import fit
from multiflora.train.precision import weight_dtype
from multiflora.train.processes import own_device
from multiflora.train.quiet import quiet_libraries
from multiflora.yaml_file import dump_yaml

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Compressed", "compress"]

_ROUNDS = 5
_TOKENS = 128


@dataclass(frozen=True)
class Compressed:
    """What a compression came to."""

    output: Path
    """Folder of the model; `multiflora.load_compressed` and `multiflora evaluate` read it."""
    parameters: Mapping[str, int]
    """Numbers stored ``before`` and ``after``; ``layers_before`` and ``layers_after``: the compressed layers alone."""
    seconds: Mapping[str, float]
    """A forward pass of one row of 128 tokens ``before`` and ``after``: medians of rounds that took turns."""
    rows_left: float
    """Share of S's rows that is left."""
    base: Results
    """Scores of the original model."""
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


def compress(source: Compression | Mapping[str, Any] | str | Path, *, quiet: bool = False) -> Compressed:
    """Fine-tune a model on a recipe's tasks while it is made smaller (LoSparse, arXiv 2306.11222).

    Every linear layer but the output head becomes L R + S; all three are trained and rows of S are taken away, see
    `multiflora.compress.losparse`. Differs from the paper: embeddings and norms stay frozen.

    Args:
        source: A recipe with a section ``compress`` in place of ``method``: a mapping, or the path of a YAML file.
        quiet: Show no progress.

    Returns:
        Sizes, times and scores; the model is in the recipe's output folder.

    Raises:
        ConfigError: The recipe has problems or holds a secret.
        ExportError: The output folder holds something already.
        DataError: A task's data cannot be used.

    Example:
        >>> compress("small.yaml").parameters  # doctest: +SKIP
    """
    plan = load_compression(source)
    recipe, spec = plan.recipe, plan.compress
    text = dump_yaml(plan.model_dump(mode="json", exclude_none=True))
    refuse_secrets([text], "The recipe")
    check_free(recipe.output)
    torch.manual_seed(recipe.seed)
    with quiet_libraries():
        tokenizer = load_tokenizer(recipe.model)
        examples = encode_tasks(recipe, tokenizer)
        dtype = weight_dtype(recipe.model.dtype, recipe.train.bf16)
        base = load_model(recipe.model, dtype).to(own_device()).eval()
        before = _score(base, tokenizer, plan, quiet)
        model = copy.deepcopy(base)
        sizes = {"before": _numbers(model), "layers_before": 0}
        sparsify(model, spec.low_rank)
        layers = compressed_layers(model)
        sizes["layers_before"] = sum(layer.S.numel() for layer in layers.values())
        all_rows = sum(layer.out_features for layer in layers.values())
        fit(model, tokenizer, recipe, examples, quiet=quiet, callbacks=[Pruner(model, spec)])
        for layer in layers.values():
            layer.slim()
        with staged(recipe.output) as folder:
            save_compressed(model, folder, dtype)
            tokenizer.save_pretrained(str(folder))
            loaded = load_compressed(folder).to(own_device())
            found = Compressed(
                output=recipe.output,
                parameters=sizes
                | {"after": _numbers(loaded), "layers_after": sum(layer.numbers() for layer in layers.values())},
                seconds=_side_by_side(base, loaded),
                rows_left=sum(len(layer.rows) for layer in layers.values()) / all_rows,
                base=before,
                compressed=_score(loaded, tokenizer, plan, quiet),
            )
            write_json(folder / "compression.json", found.to_dict())
            write_text(folder / "compress.yaml", text)
    return found


def _numbers(model: Any) -> int:
    """Parameters, those that are another's counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _score(model: Any, tokenizer: Any, plan: Compression, quiet: bool) -> Results:
    wanted = plan.recipe.evaluate
    return evaluate(
        model,
        tokenizer,
        plan.recipe.tasks,
        split=wanted.split,
        limit=wanted.limit,
        batch_size=wanted.batch_size,
        max_new_tokens=wanted.max_new_tokens,
        extra_tasks=wanted.extra_tasks,
        harness_tasks=wanted.harness_tasks,
        chat_template=plan.recipe.model.chat_template,
        progress=not quiet,
    )


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
