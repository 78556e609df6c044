"""What may be said of a method: a verdict, and a sentence that claims no more than the tests allow. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from multiflora.comparison.power import detectable, seeds_to_decide
from multiflora.comparison.statistics import CLAIM, LEVEL, Interval, Spread

__all__ = ["Claim", "Verdict", "answer", "duration", "sentence", "verdict_of"]

Verdict: TypeAlias = Literal["better", "worse", "no worse", "undecided"]
"""Against the baseline; ``no worse``: by less than the margin, if at all."""

MOST_SEEDS = 100
"""More seeds than this are not advised: the difference is then not worth the time."""


class Claim(NamedTuple):
    """A difference to the baseline, ours minus the baseline's, and what it has to pass."""

    interval: Interval
    p: float | None
    """Corrected; None from a single seed."""
    lower_is_better: bool = False
    spread: Spread | None = None
    """What the difference's variance is made of; None where it is not known."""
    level: float = CLAIM
    """A claim needs p below it."""
    tests: int = 1
    """How many differences the first of them was corrected for."""
    margin: float | None = None
    """A loss that does not matter, in the measure's own unit; None: any loss matters."""
    p_margin: float | None = None
    """Corrected p of "worse by the margin or more"; None where there is no margin."""
    tuned: bool = True
    """Whether both methods are tuned; nothing is shown where they are not, see `multiflora.comparison.tuning`."""

    @property
    def verdict(self) -> Verdict:
        """What may be said.

        Example:
            >>> Claim(Interval(-0.002, -0.004, 0.0), 0.3, margin=0.01, p_margin=0.001).verdict
            'no worse'
        """
        if self.p is None or not self.tuned:
            return "undecided"
        better = (self.interval.mean > 0) != self.lower_is_better
        claimed = self.p < self.level and self.interval.mean != 0
        if claimed and better:
            return "better"
        if self.p_margin is not None and self.p_margin < self.level:
            return "no worse"
        return "worse" if claimed else "undecided"

    @property
    def shown(self) -> int:
        """1 if the method is better than the baseline beyond chance, -1 if worse, 0 if neither could be shown."""
        return {"better": 1, "worse": -1}.get(self.verdict, 0)

    @property
    def further_seeds(self) -> int | None:
        """How many more seeds would decide it four times out of five, were the difference as it looks now.

        None where it is decided, where nothing is known of its spread, or where no number up to `MOST_SEEDS` would.
        """
        if self.spread is None or self.verdict != "undecided":
            return None
        ours = -self.interval.mean if self.lower_is_better else self.interval.mean
        # an early look's level is small; the last one's is nearly all there is
        return seeds_to_decide(ours, self.spread, CLAIM / self.tests, margin=self.margin, most=MOST_SEEDS)


def verdict_of(claims: Mapping[str, Claim]) -> Verdict:
    """One verdict from all measures: the macro score's where it has one, else that of the nats.

    Example:
        >>> verdict_of({"score": Claim(Interval(0.0, -0.1, 0.1), 0.9), "nll": Claim(Interval(-1, -2, 0), 0.001, True)})
        'better'
    """
    found = [claim.verdict for claim in claims.values()]
    return next((verdict for verdict in found if verdict != "undecided"), "undecided")


def sentence(
    label: str,
    reference: str,
    claims: Mapping[str, Claim],
    ratio: float,
    seeds: int,
    missing: str = "",
    seed_seconds: float | None = None,
) -> str:
    """Say what was found of one method.

    Args:
        label: The method.
        reference: The baseline.
        claims: ``score`` (a share, told in points of 100) and ``nll`` (nats per token), as far as measured.
        ratio: Its trainable parameters over the baseline's.
        seeds: Trainings of each.
        missing: What a verdict waits for, see `multiflora.comparison.tuning.missing`.
        seed_seconds: What one more seed costs, for all methods together; None: not known.

    Example:
        >>> spread = Spread(rows=0.0, seeds=2.5e-5, freedom=4)
        >>> claims = {"score": Claim(Interval(0.008, -0.006, 0.022), 0.37, spread=spread)}
        >>> print(sentence("rlora", "lora", claims, 1.0, 5))  # doctest: +NORMALIZE_WHITESPACE
        Undecided: no difference between rlora and lora could be shown: its macro score was 0.8 points higher (95 %
        interval -0.6 to 2.2, p = 0.37 after correction). With 1.00 times the parameters and 5 seeds, a true difference
        of 2.4 points would be found four times out of five. About 18 further seeds would decide it, were the difference
        as it looks now.
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
    decided = {key: claim for key, claim in claims.items() if claim.verdict != "undecided"}
    if not decided:
        told = "; its ".join(_full(key, claim) for key, claim in claims.items())
        return (
            f"Undecided: no difference between {label} and {reference} could be shown: its {told}. "
            f"{_seen(claims, budget)}{_further(claims, seed_seconds)}"
        )
    signs = {claim.shown for claim in decided.values()} - {0}
    words = {1: "did better than", -1: "did worse than"}
    if len(signs) > 1:
        verdict = f"did both better and worse than {reference}"
    elif signs:
        verdict = f"{words[signs.pop()]} {reference}"
    else:
        verdict = f"is no worse than {reference} by {_margin(decided)} or more"
    shown = {key: claim for key, claim in decided.items() if claim.shown} or decided
    told = "; its ".join(_full(key, claim) for key, claim in shown.items())
    also = "".join(f" In {_NAMES[key]} {_rest(key, claims[key])}." for key in claims if key not in shown)
    return f"{label} {verdict}: its {told}.{also} {budget}."


def answer(reference: str, claims: Mapping[str, Mapping[str, Claim]]) -> str:
    """Say in a sentence or two which methods earned their parameters.

    Args:
        reference: The baseline.
        claims: Label -> its claims.

    Example:
        >>> answer("lora", {"lora": {}, "rlora": {"score": Claim(Interval(0.02, 0.01, 0.03), 0.004)}})
        'rlora did better than lora.'
    """
    kinds: dict[str, list[str]] = {
        "better": [],
        "worse": [],
        "mixed": [],
        "no worse": [],
        "undecided": [],
        "untuned": [],
    }
    margin = ""
    for label, found in claims.items():
        if label == reference:
            continue
        signs = {claim.shown for claim in found.values()} - {0}
        if any(not claim.tuned for claim in found.values()):
            kind = "untuned"
        elif len(signs) > 1:
            kind = "mixed"
        else:
            kind = {1: "better", -1: "worse"}[signs.pop()] if signs else verdict_of(found)
        kinds[kind].append(label)
        margin = margin or _margin(found)
    parts = []
    if kinds["better"]:
        parts.append(f"{_listed(kinds['better'])} did better than {reference}.")
    if kinds["worse"]:
        parts.append(f"{_listed(kinds['worse'])} did worse than {reference}.")
    if kinds["mixed"]:
        parts.append(f"{_listed(kinds['mixed'])} did better than {reference} by one measure and worse by the other.")
    if kinds["no worse"]:
        verb = "is" if len(kinds["no worse"]) == 1 else "are"
        parts.append(f"{_listed(kinds['no worse'])} {verb} no worse than {reference} by {margin} or more.")
    if kinds["undecided"] and not parts:
        parts.append(
            f"Undecided: no difference to {reference} could be shown for any method ({_listed(kinds['undecided'])})."
        )
    elif kinds["undecided"]:
        parts.append(f"Undecided: for {_listed(kinds['undecided'])} no difference to {reference} could be shown.")
    if kinds["untuned"]:
        parts.append(f"Nothing is said of {_listed(kinds['untuned'])}: not tuned, or {reference} is not.")
    return " ".join(parts) or f"There is nothing to compare {reference} with."


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(4000), duration(130)
        ('1 h 07 min', '2 min')
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(minutes, 1)} min"


_NAMES = {"score": "macro score", "nll": "nats per token of the right answers"}
_UNITS = {"score": ("points", 100.0, 1), "nll": ("nats", 1.0, 4)}


def _seen(claims: Mapping[str, Claim], budget: str) -> str:
    """Which true difference would be found, under the rule that is used."""
    found = []
    for key, claim in claims.items():
        if claim.spread is not None and claim.level > 0:
            unit, factor, digits = _UNITS[key]
            found.append(f"{detectable(claim.spread, claim.level / claim.tests) * factor:.{digits}f} {unit}")
    if not found:
        if any(claim.level == 0 for claim in claims.values()):
            return f"{budget}, nothing is claimed yet: the seeds of the planned look are not all there."
        return f"{budget}."
    return f"{budget}, a true difference of {' or '.join(found)} would be found four times out of five."


def _further(claims: Mapping[str, Claim], seed_seconds: float | None) -> str:
    """How many more seeds would decide it, and what they cost."""
    if all(claim.spread is None for claim in claims.values()):
        return ""
    needed = [claim.further_seeds for claim in claims.values()]
    known = [number for number in needed if number is not None]
    if known:
        number = min(known)
        cost = f" ({duration(number * seed_seconds)} for all methods)" if seed_seconds else ""
        seeds = "seed" if number == 1 else "seeds"
        return f" About {number} further {seeds}{cost} would decide it, were the difference as it looks now."
    score = claims.get("score")
    advice = " Set compare.margin to what does not matter to you." if score is not None and score.margin is None else ""
    return f" At the difference that it looks to be, {MOST_SEEDS} seeds would not decide it.{advice}"


def _margin(claims: Mapping[str, Claim]) -> str:
    """The margin in words; nothing where there is none."""
    for key, claim in claims.items():
        if claim.margin is not None:
            unit, factor, _ = _UNITS[key]
            amount = f"{claim.margin * factor:g}"
            return f"{amount} {unit[:-1] if amount == '1' else unit}"
    return ""


def _rest(key: str, claim: Claim) -> str:
    """What is said of a measure that did not decide."""
    if claim.verdict == "no worse":
        return f"it is no worse by {_margin({key: claim})} or more: {_full(key, claim)}"
    return f"no difference could be shown: {_full(key, claim)}"


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


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
