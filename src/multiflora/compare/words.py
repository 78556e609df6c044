"""What may be said of a method: one sentence that claims no more than its intervals allow. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from multiflora.compare.statistics import CLAIM, LEVEL, Interval

__all__ = ["Claim", "answer", "sentence"]


class Claim(NamedTuple):
    """A difference to the baseline, ours minus the baseline's."""

    interval: Interval
    p: float | None
    """Corrected; None from a single seed."""
    lower_is_better: bool = False
    tuned: bool = True
    """Whether both methods are tuned; nothing is shown where they are not, see `multiflora.compare.tuning`."""

    @property
    def shown(self) -> int:
        """1 if the method is better than the baseline beyond chance, -1 if worse, 0 if neither could be shown."""
        if not self.tuned or self.p is None or self.p >= CLAIM or self.interval.mean == 0:
            return 0
        return 1 if (self.interval.mean > 0) != self.lower_is_better else -1


def sentence(
    label: str, reference: str, claims: Mapping[str, Claim], ratio: float, seeds: int, missing: str = ""
) -> str:
    """Say what was found of one method.

    Args:
        label: The method.
        reference: The baseline.
        claims: ``score`` (a share, told in points of 100) and ``nll`` (nats per token), as far as measured.
        ratio: Its trainable parameters over the baseline's.
        seeds: Trainings of each.
        missing: What a verdict waits for, see `multiflora.compare.tuning.missing`.

    Example:
        >>> claims = {"score": Claim(Interval(0.003, -0.012, 0.018), 1.0)}
        >>> print(sentence("rlora", "lora", claims, 1.0, 3))  # doctest: +NORMALIZE_WHITESPACE
        No difference between rlora and lora could be shown: its macro score was 0.3 points higher (95 % interval -1.2
        to 1.8, p = 1.00 after correction). With 1.00 times the parameters and 3 seeds, differences of less than about
        1.5 points would mostly go unnoticed.
    """
    if label == reference:
        return f"{label} is the baseline that the others are tested against."
    if not claims:
        return f"Nothing was measured that {label} and {reference} could be compared by."
    if seeds < 2:
        found = " and ".join(_distance(key, claim) for key, claim in claims.items())
        return (
            f"Nothing can be said of {label} against {reference} from one seed, however many rows it is scored on: its "
            f"{found}, which one other seed may turn around. Run at least three."
        )
    if missing:
        told = "; its ".join(_full(key, claim) for key, claim in claims.items())
        return f"Nothing is said of {label} against {reference} yet: {missing}. As trained, its {told}."
    budget = f"With {ratio:.2f} times the parameters and {seeds} seeds"
    shown = {key: claim for key, claim in claims.items() if claim.shown}
    if not shown:
        told = "; its ".join(_full(key, claim) for key, claim in claims.items())
        unseen = " or ".join(_half_width(key, claim) for key, claim in claims.items())
        return (
            f"No difference between {label} and {reference} could be shown: its {told}. {budget}, differences of less "
            f"than about {unseen} would mostly go unnoticed."
        )
    signs = {claim.shown for claim in shown.values()}
    verdict = "better than" if signs == {1} else "worse than" if signs == {-1} else "both better and worse than"
    told = "; its ".join(_full(key, claim) for key, claim in shown.items())
    rest = [key for key in claims if key not in shown]
    also = "".join(f" In {_NAMES[key]} no difference could be shown: {_full(key, claims[key])}." for key in rest)
    return f"{label} did {verdict} {reference}: its {told}.{also} {budget}."


def answer(reference: str, claims: Mapping[str, Mapping[str, Claim]]) -> str:
    """Say in a sentence or two which methods earned their parameters.

    Args:
        reference: The baseline.
        claims: Label -> its claims.

    Example:
        >>> answer("lora", {"lora": {}, "rlora": {"score": Claim(Interval(0.02, 0.01, 0.03), 0.004)}})
        'rlora did better than lora.'
    """
    kinds: dict[str, list[str]] = {"better": [], "worse": [], "mixed": [], "open": [], "untuned": []}
    for label, found in claims.items():
        if label == reference:
            continue
        signs = {claim.shown for claim in found.values()} - {0}
        kind = (
            "untuned"
            if any(not claim.tuned for claim in found.values())
            else "open"
            if not signs
            else "mixed"
            if len(signs) > 1
            else "better"
            if signs == {1}
            else "worse"
        )
        kinds[kind].append(label)
    parts = []
    if kinds["better"]:
        parts.append(f"{_listed(kinds['better'])} did better than {reference}.")
    if kinds["worse"]:
        parts.append(f"{_listed(kinds['worse'])} did worse than {reference}.")
    if kinds["mixed"]:
        parts.append(f"{_listed(kinds['mixed'])} did better than {reference} by one measure and worse by the other.")
    if kinds["open"] and not parts:
        parts.append(f"No difference to {reference} could be shown for any method ({_listed(kinds['open'])}).")
    elif kinds["open"]:
        parts.append(f"For {_listed(kinds['open'])} no difference to {reference} could be shown.")
    if kinds["untuned"]:
        parts.append(f"Nothing is said of {_listed(kinds['untuned'])}: not tuned, or {reference} is not.")
    return " ".join(parts) or f"There is nothing to compare {reference} with."


_NAMES = {"score": "macro score", "nll": "nats per token of the right answers"}
_UNITS = {"score": ("points", 100.0, 1), "nll": ("nats", 1.0, 4)}


def _distance(key: str, claim: Claim) -> str:
    unit, factor, digits = _UNITS[key]
    mean = claim.interval.mean * factor
    way = "higher" if mean >= 0 else "lower"
    verb = "was" if key == "score" else "were"
    return f"{_NAMES[key]} {verb} {abs(mean):.{digits}f} {unit} {way}"


def _full(key: str, claim: Claim) -> str:
    _, factor, digits = _UNITS[key]
    low, high = claim.interval.low, claim.interval.high
    assert low is not None  # there is more than one seed
    assert high is not None
    assert claim.p is not None
    p = "p < 0.001" if claim.p < 0.001 else f"p = {claim.p:.{2 if claim.p > 0.06 else 3}f}"
    ends = f"{low * factor:.{digits}f} to {high * factor:.{digits}f}"
    return f"{_distance(key, claim)} ({100 * LEVEL:.0f} % interval {ends}, {p} after correction)"


def _half_width(key: str, claim: Claim) -> str:
    unit, factor, digits = _UNITS[key]
    assert claim.interval.low is not None
    assert claim.interval.high is not None
    return f"{(claim.interval.high - claim.interval.low) / 2 * factor:.{digits}f} {unit}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
