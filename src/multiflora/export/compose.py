r"""Several LoRAs as one: their exact weighted sum, LoraHub's weights found on a few examples, or experts of a router.

The exact sum :math:`\sum_i w_i B_i A_i` stacks the factors: any ranks, no search. For the others see `lorahub` and
`route`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multiflora.errors import ConfigError, ExportError
from multiflora.export.examples import read_examples
from multiflora.export.few_shot import FewShotLoss, with_lora
from multiflora.export.lorahub import load_nevergrad, search
from multiflora.export.low_rank import stack
from multiflora.export.plain import Pair, PlainLora, read_config, read_lora, write_lora
from multiflora.export.route import route
from multiflora.export.saved import method_of
from multiflora.export.source import base_name, load_base, load_tokenizer_of
from multiflora.export.stage import check_free, staged
from multiflora.files import user_path, write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Composition", "compose"]


@dataclass(frozen=True)
class Composition:
    """What was put together, and how well it does on the examples."""

    output: Path
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    how: str
    """``sum`` (exact), ``lorahub`` or ``route``."""
    loss_before: float | None = None
    """Nats per token of the base model on the examples, where there were any."""
    loss_after: float | None = None
    evaluations: int = 0
    """How often the loss was computed in the search."""
    method: Mapping[str, Any] | None = None
    """Of a router: the ``method`` section of the recipe that trains it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "how": self.how,
            "weights": dict(zip(self.adapters, self.weights, strict=True)),
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "evaluations": self.evaluations,
            **({} if self.method is None else {"method": dict(self.method)}),
        }

    def table(self) -> Table:
        """One line for each adapter."""
        from multiflora.text_table import TextTable

        table = TextTable("adapter", "weight")
        for name, weight in zip(self.adapters, self.weights, strict=True):
            table.add_row(name, f"{weight:+.3f}")
        return table


def compose(
    adapters: Sequence[str | Path],
    folder: str | Path,
    *,
    weights: Sequence[float] | None = None,
    examples: str | Path | Sequence[Any] | None = None,
    base: str | Path | None = None,
    budget: int = 40,
    seed: int = 42,
    routed: bool = False,
    tokenizer: Any = None,
) -> Composition:
    """Put several LoRAs together into one.

    With ``examples``, weights are searched (LoraHub); with ``routed`` they become the experts of an adapter whose
    router is to be trained; else the sum is exact, each LoRA times its weight. Adapters of our methods that convert
    exactly may stand among them.

    Args:
        adapters: At least two folders, adapters of one base model.
        folder: Where the LoRA goes; it must not hold anything yet.
        weights: One for each adapter; 1 for all where none are given. Not with ``examples``.
        examples: A few examples of the task that is wanted (see `multiflora.export.examples.read_examples`).
        base: The base model's folder or hub id, where the adapters name none.
        budget: How often the loss may be computed.
        seed: Of the search.
        routed: Blend them by a router, token by token. Not with ``examples`` or ``weights``.
        tokenizer: The base model's, where it is not to be loaded.

    Returns:
        The weights, and the loss on the examples before and after.

    Raises:
        ConfigError: Fewer than two adapters, or weights that do not fit them.
        ExportError: Adapters that cannot be put together; the message says why.
        EnvironmentProblem: The package nevergrad is not installed.

    Example:
        >>> compose(["runs/a", "runs/b"], "runs/both", examples="few.jsonl")  # doctest: +SKIP
    """
    if examples is not None:
        load_nevergrad()  # before anything is read that takes time
    folders, output = [user_path(adapter) for adapter in adapters], user_path(folder)
    _check_words(folders, weights, examples, budget, routed)
    check_free(output)
    names = tuple(map(str, adapters))
    with ExitStack() as scratch:
        loras = [_plain(place, Path(scratch.enter_context(tempfile.TemporaryDirectory()))) for place in folders]
        _check_extras(loras)
        if routed:
            even = (1 / len(loras),) * len(loras)
            return Composition(output, names, even, "route", method=route(loras, output))
        if examples is None:
            chosen = tuple(float(weight) for weight in (weights or [1.0] * len(loras)))
            pairs, made = _sum(loras, chosen), Composition(output, names, chosen, "sum")
        else:
            _check_same_shape(loras)
            place = base_name(folders[0], base)
            rows = read_examples(examples, tokenizer or load_tokenizer_of(folders[0], place))
            each = [list(lora.pairs()) for lora in loras]
            loss = FewShotLoss(with_lora(load_base(place), loras[0].config, each[0]), rows)
            found = search(each, loss, budget=budget, seed=seed)
            pairs = found.pairs
            made = Composition(output, names, found.weights, "lorahub", found.loss_before, found.loss_after, budget)
        with staged(output) as where:
            write_lora(where, pairs, _naming(loras[0].config, pairs))
            write_json(where / "composition.json", made.to_dict())
    return made


def _check_words(
    folders: Sequence[Path], weights: Sequence[float] | None, examples: Any, budget: int, routed: bool
) -> None:
    if len(folders) < 2:
        raise ConfigError(f"There is {len(folders)} adapter to compose; expected at least two.")
    if weights is not None and examples is not None:
        raise ConfigError("weights and examples are both given; examples search the weights. Leave one out.")
    if routed and (weights is not None or examples is not None):
        word = "weights" if weights is not None else "examples"
        raise ConfigError(f"route and {word} are both given; a router learns its weights. Leave one out.")
    if weights is not None and len(weights) != len(folders):
        raise ConfigError(f"There are {len(folders)} adapters and {len(weights)} weights; give one for each.")
    if budget < 1:
        raise ConfigError(f"budget is {budget}; expected a whole number of at least 1.")


def _plain(folder: Path, scratch: Path) -> PlainLora:
    """An adapter as plain LoRA, converted first where it is one of ours."""
    if method_of(read_config(folder)) is None:
        return read_lora(folder)
    from multiflora.export.convert import to_lora

    report = to_lora(folder, scratch / "lora")
    if len(report.adapters) > 1:
        tasks = ", ".join(str(made.task) for made in report.adapters)
        raise ExportError(
            f"{folder} has one update for each task ({tasks}). Convert it for one of them first, with --task."
        )
    return read_lora(scratch / "lora")


def _check_extras(loras: Sequence[PlainLora]) -> None:
    for lora in loras:
        if lora.others:
            raise ExportError(
                f"{lora.folder} holds {lora.others[0]} besides its layers; modules trained in full cannot be added up."
            )


def _check_same_shape(loras: Sequence[PlainLora]) -> None:
    """LoraHub adds the factors themselves, so they must be of one shape."""
    first = {pair.name: tuple(pair.A.shape) + tuple(pair.B.shape) for pair in loras[0].pairs()}
    for lora in loras[1:]:
        other = {pair.name: tuple(pair.A.shape) + tuple(pair.B.shape) for pair in lora.pairs()}
        strange = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if strange:
            raise ExportError(
                f"{loras[0].folder} and {lora.folder} differ in layers or ranks (first: {strange[0]}); searched "
                "weights need factors of one shape. Bring them to one rank with `multiflora convert --rank`, or give "
                "--weights for an exact sum."
            )


def _sum(loras: Sequence[PlainLora], weights: Sequence[float]) -> list[Pair]:
    """The exact weighted sum, layer by layer; a layer that some lack is the sum over the others."""
    held: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for pair in lora.pairs():
            held.setdefault(pair.name, []).append((pair.A, pair.B * weight))
    return [Pair(name, *stack(parts)) for name, parts in held.items()]


def _naming(config: Any, pairs: Sequence[Pair]) -> Any:
    """The config with its layers named one by one: other adapters may have others."""
    named = copy.copy(config)
    named.target_modules = sorted(pair.name for pair in pairs)
    named.exclude_modules = named.layers_to_transform = named.layers_pattern = None
    return named
