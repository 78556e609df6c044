r"""Forgetting: what training did to the tasks that were not trained on, method against method.

A method's change is its macro score on them minus the untrained model's. All methods are scored on the same rows after
trainings with the same seeds, so the untrained model drops out of a difference of two changes, which is tested as the
main one is, paired over seeds and rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from multiflora.comparison.paired import Cell, outcomes_of, share_rows
from multiflora.comparison.statistics import CLAIM, Difference, Interval, crossed_tests, holm, t_interval
from multiflora.evaluation.results import LOWER_IS_BETTER

__all__ = ["Forgetting", "corrected", "forgetting", "forgetting_words", "listed"]


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """What became of tasks that were not trained on."""

    tasks: tuple[str, ...]
    """Those with a score of each row of which higher is better."""
    changes: Mapping[str, Interval]
    """Label -> change of the macro score from the untrained model's, over seeds: below 0 is forgetting."""
    differences: Mapping[str, Difference]
    """Label -> its change minus the baseline's: below 0, it forgot more."""
    p: Mapping[str, float | None]
    """Label -> the difference's p, corrected for all methods."""

    def shown(self, label: str) -> int:
        """1 if the method kept more than the baseline beyond chance, -1 if it forgot more, 0 if neither was shown."""
        p, mean = self.p.get(label), self.differences[label].interval.mean
        return 0 if p is None or p >= CLAIM or mean == 0 else 1 if mean > 0 else -1


def forgetting(
    base: Cell, by_label: Mapping[str, Sequence[Cell]], reference: str, tasks: Sequence[str]
) -> Forgetting | None:
    """Compare all methods with the baseline on tasks that were not trained on; None where there is nothing to compare.

    Args:
        base: The untrained model's cell.
        by_label: Method -> its cells, the same seeds for all.
        reference: The baseline's label.
        tasks: Those not trained on.
    """
    kept = tuple(
        task
        for task in tasks
        if task in base["rows"] and base["scores"]["tasks"][task]["metric"] not in LOWER_IS_BETTER
    )
    if not kept or reference not in by_label:
        return None
    outcomes = {label: outcomes_of(cells, kept) for label, cells in by_label.items()}
    before = np.mean([np.mean(base["rows"][task]["score"]) for task in kept])
    after = {label: np.mean([rows.mean(1) for rows in own.values()], axis=0) for label, own in outcomes.items()}
    shared = share_rows(by_label[reference], kept)
    differences = crossed_tests(outcomes, reference, shared_rows=shared) if len(outcomes) > 1 else {}
    return Forgetting(
        tasks=kept,
        changes={label: t_interval(values - before) for label, values in after.items()},
        differences=differences,
        p=corrected(differences),
    )


def corrected(differences: Mapping[str, Difference]) -> dict[str, float | None]:
    """The differences' p, corrected for their number; None where there is none."""
    known = [key for key, difference in differences.items() if difference.p is not None]
    found = dict(zip(known, holm([differences[key].p or 0.0 for key in known]), strict=True))
    return {key: found.get(key) for key in differences}


def forgetting_words(found: Forgetting | None, reference: str) -> str:
    """Say in a sentence which methods forgot more than the baseline, and what became of the baseline itself.

    Example:
        >>> change = Interval(-0.03, -0.04, -0.02)
        >>> gap = {"rlora": Difference(Interval(-0.02, -0.03, -0.01), 0.001)}
        >>> found = Forgetting(tasks=("boolq",), changes={"lora": change}, differences=gap, p={"rlora": 0.001})
        >>> print(forgetting_words(found, "lora"))  # doctest: +NORMALIZE_WHITESPACE
        On tasks not trained on (boolq), rlora forgot more than lora (2.0 points, p = 0.001), which lost 3.0 points
        itself.
    """
    if found is None or not found.differences:
        return ""
    own = found.changes[reference].mean
    itself = f"{'lost' if own < 0 else 'gained'} {abs(own) * 100:.1f} points"
    more = [label for label in found.differences if found.shown(label) < 0]
    less = [label for label in found.differences if found.shown(label) > 0]
    parts = [
        f"{listed([_told(found, label) for label in labels])} {verb} than {reference}"
        if len(labels) > 1
        else f"{labels[0]} {verb} than {reference} ({_points(found, labels[0])})"
        for labels, verb in ((more, "forgot more"), (less, "kept more"))
        if labels
    ]
    where = f"On tasks not trained on ({', '.join(name.removeprefix('harness/') for name in found.tasks)}), "
    if not parts:
        return f"{where}no method was shown to forget more or less than {reference}, which {itself}."
    return f"{where}{' and '.join(parts)}, which {itself} itself."


def _told(found: Forgetting, label: str) -> str:
    return f"{label} ({_points(found, label)})"


def _points(found: Forgetting, label: str) -> str:
    p = found.p[label]
    assert p is not None  # a difference is shown only by its p
    return (
        f"{abs(found.differences[label].interval.mean) * 100:.1f} points, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    )


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
