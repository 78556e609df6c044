"""The targets, each with what was measured: a ratio of each case, its quartiles, what the floor allows, held or missed.

A ratio is read from the clock that `Results.clock` names. Its floor is what it would be if the packed op took no longer
than its products alone, or a server no longer than its model: where even that lies beyond a target, no implementation
reaches it on that machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from multiflora.bench.results import (
    Clock,
    ExpertsWork,
    GenerateCase,
    LayerCase,
    Results,
    ServeCase,
    StepCase,
    TrainingCase,
)
from multiflora.bench.stats import Estimate, extra_ratio, median, over_floor, ratio, spread, total

__all__ = ["TARGETS", "Line", "Target", "Verdict", "verdicts"]


class Line(NamedTuple):
    """One case of a target."""

    case: str
    estimate: Estimate
    """The ratio by the clock that is read."""
    wall: Estimate | None = None
    """The same by the clock on the wall; None for memory."""
    floor: float | None = None
    """The ratio if ours took its products' time alone; None where there is no such floor."""


class Target(NamedTuple):
    """What is to be held."""

    name: str
    limit: float
    lines: Callable[[Results], Iterator[Line]]
    """Its ratio in every case that has one."""
    at_least: bool = False
    needs_gpu: bool = False
    ours: str = "packed"
    """The competitor it is about."""

    def held(self, value: float) -> bool:
        """Whether a ratio is on the right side of the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def bound(self) -> str:
        """The limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


class Verdict(NamedTuple):
    """A target and its cases."""

    target: Target
    lines: tuple[Line, ...]

    @property
    def held(self) -> tuple[Line, ...]:
        """The cases in which it holds."""
        return tuple(line for line in self.lines if self.target.held(line.estimate.value))

    @property
    def worst(self) -> Line | None:
        """The case that is farthest on the wrong side."""
        choose = min if self.target.at_least else max
        return choose(self.lines, key=lambda line: line.estimate.value, default=None)

    @property
    def middle(self) -> float | None:
        """The median of the cases."""
        return median([line.estimate.value for line in self.lines]) if self.lines else None

    @property
    def out_of_reach(self) -> tuple[Line, ...]:
        """The cases in which even the floor misses the target."""
        return tuple(line for line in self.lines if line.floor is not None and not self.target.held(line.floor))

    @property
    def undecided(self) -> tuple[Line, ...]:
        """The cases that are too close to tell: their quartiles lie on both sides of the limit, and it is in reach."""
        beyond = set(self.out_of_reach) - set(self.held)
        held = self.target.held
        return tuple(
            line for line in self.lines if line not in beyond and held(line.estimate.low) != held(line.estimate.high)
        )

    @property
    def word(self) -> str:
        """``held``, ``missed``, ``held in 3 of 4`` or ``not measured``."""
        if not self.lines:
            return "not measured"
        if len(self.held) == len(self.lines):
            return "held"
        return f"held in {len(self.held)} of {len(self.lines)}" if self.held else "missed"


def verdicts(results: Results) -> list[Verdict]:
    """Judge every target.

    Example:
        >>> [verdict.word for verdict in verdicts(load(Path("bench.json")))][:2]  # doctest: +SKIP
        ['held', 'held in 3 of 4']
    """
    return [Verdict(target, tuple(target.lines(results))) for target in TARGETS]


def _line(results: Results, case: str, compare: Callable[[Clock], Estimate], floor: float | None = None) -> Line:
    return Line(case, compare(results.clock), compare("wall"), floor)


def _extra_over(
    opponent: str, dropout: float | None = None, *, on_gpu: bool = False
) -> Callable[[Results], Iterator[Line]]:
    """Ours against an opponent, by the time they add to the frozen layer."""

    def lines(results: Results) -> Iterator[Line]:
        for case in _layers(results, on_gpu):
            if opponent in case.seconds and dropout in (None, case.dropout):
                yield _line(
                    results,
                    case.name,
                    lambda clock, s=case.seconds: extra_ratio(  # type: ignore[misc]
                        total(s, "packed", clock), total(s, opponent, clock), total(s, "frozen", clock)
                    ),
                    _floor_of_extra(case, opponent, results.clock),
                )

    return lines


def _layers(results: Results, on_gpu: bool) -> Iterator[LayerCase]:
    if not on_gpu or results.machine.kind == "cuda":
        yield from (case for case in results.layers if not on_gpu or case.model == "Llama-3.1-8B")


def _floor_of_extra(case: LayerCase, opponent: str, clock: Clock) -> float:
    theirs, frozen = (total(case.seconds, name, clock) for name in (opponent, "frozen"))
    added = [a - b for a, b in zip(theirs, frozen, strict=True)]
    return median(total(case.seconds, "products", clock)) / median(added)


def _over_floor(results: Results) -> Iterator[Line]:
    for case in _layers(results, on_gpu=True):
        yield _line(
            results,
            case.name,
            lambda clock, s=case.seconds: over_floor(  # type: ignore[misc]
                total(s, "packed", clock), total(s, "frozen", clock), total(s, "products", clock)
            ),
            1.0,
        )


def _more_heads(results: Results) -> Iterator[Line]:
    for case in results.heads:
        yield _line(
            results,
            f"{case.model} {case.layer} {case.d_in}→{case.d_out}, {case.tokens} tokens, {case.dtype}, "
            f"dropout {case.dropout:g}, total rank {case.heads * case.rank}",
            lambda clock, s=case.seconds: extra_ratio(  # type: ignore[misc]
                total(s, "packed 16", clock), total(s, "packed 2", clock), total(s, "frozen", clock)
            ),
        )


def _memory(results: Results) -> Iterator[Line]:
    for case in results.memory:
        share = case.per_token("packed") / case.per_token("loop")
        yield Line(case.name, Estimate(share, share, share))


def _whole_step(ours: str, opponent: str, dropout: float | None = None) -> Callable[[Results], Iterator[Line]]:
    """Ours against an opponent, by the time of a whole step."""

    def lines(results: Results) -> Iterator[Line]:
        for case in results.steps:
            if {ours, opponent} <= set(case.seconds) and dropout in (None, case.dropout):
                yield _line(
                    results,
                    case.name,
                    lambda clock, s=case.seconds: ratio(total(s, ours, clock), total(s, opponent, clock)),  # type: ignore[misc]
                    _floor_of_step(case, ours, opponent, results.clock),
                )

    return lines


def _floor_of_step(case: StepCase, ours: str, opponent: str, clock: Clock) -> float | None:
    """The frozen model's passes and the products alone, over the opponent's step."""
    if ours == "packed" and "products" not in case.seconds:
        return None
    # results may be older than the timing of MultiLoRA's products: the frozen model alone is then its floor
    own = {"packed": "products", "multilora": "multilora products"}[ours]
    parts = [name for name in ("frozen", own) if name in case.seconds]
    least = [sum(added) for added in zip(*(total(case.seconds, name, clock) for name in parts), strict=True)]
    return ratio(least, total(case.seconds, opponent, clock)).value


def _experts(*works: ExpertsWork) -> Callable[[Results], Iterator[Line]]:
    """Branches of a mixture's experts against peft's LoRA of them, by the time they add to the frozen experts."""

    def lines(results: Results) -> Iterator[Line]:
        for case in results.experts:
            if case.work in works:
                yield _line(
                    results,
                    case.name,
                    lambda clock, s=case.seconds: extra_ratio(  # type: ignore[misc]
                        total(s, "packed", clock), total(s, "peft", clock), total(s, "frozen", clock)
                    ),
                )

    return lines


def _training(results: Results) -> Iterator[Line]:
    for case in results.training:
        yield _line(results, case.name, lambda clock, case=case: _speed_ratio(case, clock))  # type: ignore[misc]


def _speed_ratio(case: TrainingCase, clock: Clock) -> Estimate:
    """Both read the same tokens, so speeds compare as the times the other way round."""
    return ratio(total(case.seconds, "trl", clock), total(case.seconds, "multiflora", clock))


def _decoding(
    names: Sequence[str], opponent: str, *, batch: int = 0, prompt: int = 32, phase: str = "decode"
) -> Callable[[Results], Iterator[Line]]:
    """Ours against an opponent, by the time of generated tokens, or of the prefill."""

    def lines(results: Results) -> Iterator[Line]:
        for case in results.generate:
            if case.prompt != prompt or batch not in (0, case.batch):
                continue
            for name in names:
                yield _line(
                    results,
                    f"{name}, {case.name}",
                    lambda clock, s=case.seconds, name=name: ratio(s[name][phase][clock], s[opponent][phase][clock]),  # type: ignore[misc]
                    _floor_of_decoding(case, opponent, phase, results.clock),
                )

    return lines


def _floor_of_decoding(case: GenerateCase, opponent: str, phase: str, clock: Clock) -> float:
    """The base model and R-LoRA's products alone, over the opponent."""
    base, products, other = (case.seconds[name][phase][clock] for name in ("base", "products", opponent))
    return ratio([a + b for a, b in zip(base, products, strict=True)], other).value


def _served(ours: str, other: str) -> Callable[[Results], Iterator[Line]]:
    """One load's tokens per second over another's: by the wall, as clients wait; also on a machine with one thread."""

    def lines(results: Results) -> Iterator[Line]:
        for case in results.serve:
            if {ours, other} <= set(case.seconds):
                found = ratio(case.speeds(ours), case.speeds(other))
                yield Line(case.name, found, found, _most_for_clients(case, results) if "client" in other else None)

    return lines


def _most_for_clients(case: ServeCase, results: Results) -> float | None:
    """What the model alone makes of a batch: tokens per second of all clients' rows at once, over one row's."""
    seconds: dict[int, float] = {}
    for alone in results.generate:
        if (alone.prompt, alone.dtype) == (case.prompt, case.dtype):
            base = alone.seconds["base"]
            written = (case.tokens - 1) / alone.tokens  # the first token comes of the prompt
            seconds[alone.batch] = median(base["prefill"]["wall"]) + written * median(base["decode"]["wall"])
    return case.clients * seconds[1] / seconds[case.clients] if {1, case.clients} <= set(seconds) else None


def _waited(results: Results) -> Iterator[Line]:
    for case in results.serve:
        yield Line(case.name, spread(case.first_tokens))


def _grown(results: Results) -> Iterator[Line]:
    for case in results.serve:
        yield Line(f"{case.name}, {case.requests:,} short requests", Estimate(case.growth, case.growth, case.growth))


_ADDITIVE_OR_ROUTED = ("multilora", "mlora", "rlora", "hydralora")
_BY_TASK = ("mtllora", "moelora")
_ALL = (*_ADDITIVE_OR_ROUTED, *_BY_TASK)

TARGETS = (
    Target("R-LoRA layer / published loop", 0.25, _extra_over("loop")),
    Target("R-LoRA layer / peft LoRA, dropout 0.1", 0.5, _extra_over("peft", 0.1)),
    Target("R-LoRA layer / peft LoRA, dropout 0", 1.0, _extra_over("peft", 0.0)),
    Target("16 heads / 2 heads", 1.15, _more_heads),
    Target("memory kept a token / published loop", 0.01, _memory),
    Target(
        "MultiLoRA step / peft LoRA 3r, dropout 0.1", 0.8, _whole_step("multilora", "peft 3r", 0.1), ours="multilora"
    ),
    Target("MultiLoRA step / peft LoRA 3r, dropout 0", 1.0, _whole_step("multilora", "peft 3r", 0.0), ours="multilora"),
    Target("R-LoRA step / peft LoRA, dropout 0.1", 0.55, _whole_step("packed", "peft", 0.1)),
    Target("R-LoRA step / peft LoRA, dropout 0", 0.9, _whole_step("packed", "peft", 0.0)),
    Target("R-LoRA step / frozen model", 1.25, _whole_step("packed", "frozen")),
    Target("training speed / SFTTrainer with peft LoRA", 1.3, _training, at_least=True),
    Target("experts: R-LoRA step / peft LoRA", 1.0, _experts("step")),
    Target("experts: R-LoRA without gradients / peft LoRA", 1.0, _experts("forward", "decode")),
    Target("token / base, batch 1", 1.15, _decoding(_ALL, "base", batch=1), ours="rlora"),
    Target("token / base, batch 16", 1.15, _decoding(_ADDITIVE_OR_ROUTED, "base", batch=16), ours="rlora"),
    Target("token / base, batch 16, gated by task", 1.2, _decoding(_BY_TASK, "base", batch=16), ours="rlora"),
    Target("token / peft LoRA, batch 1", 0.85, _decoding(_ALL, "peft", batch=1), ours="rlora"),
    Target("token / peft LoRA, batch 16", 0.55, _decoding(_ALL, "peft", batch=16), ours="rlora"),
    Target("prefill of 512 / base", 1.1, _decoding(_ALL, "base", prompt=512, phase="prefill"), ours="rlora"),
    Target("token of 16 heads / 2 heads", 1.1, _decoding(("rlora-16",), "rlora-2")),
    Target("served: 16 clients / 1 client", 6.0, _served("base", "base, 1 client"), at_least=True),
    Target("served: R-LoRA / base", 0.8, _served("rlora", "base"), at_least=True),
    Target("served: tokens before a short request's first", 3.0, _waited),
    Target("served: mixed / one adapter", 0.75, _served("mixed", "rlora"), at_least=True),
    Target("served: memory, last half", 1.02, _grown),
    Target("served: base / transformers serve", 1.0, _served("base", "transformers serve"), at_least=True),
    Target("GPU: R-LoRA layer / peft LoRA", 0.7, _extra_over("peft", on_gpu=True), needs_gpu=True),
    Target("GPU: R-LoRA layer / compiled loop", 1.0, _extra_over("compiled loop", on_gpu=True), needs_gpu=True),
    Target("GPU: R-LoRA layer / floor", 2.0, _over_floor, needs_gpu=True),
)
"""Ours over an opponent.

A layer compares by the time that forward and backward take beyond the frozen layer alone, with 5 heads of rank 8; so do
numbers of heads, at one total rank, and a mixture's experts, over the frozen ones. A step is a whole training step of
SmolLM2-135M with adapters on all linear layers, a frozen model's step its forward pass and the gradient of its input.
peft's LoRA has as many trainable parameters as R-LoRA, or three times MultiLoRA's rank. Training speed is in tokens a
second, and so is what is served.
"""
