"""What an evaluation gives back: one score per task, and their mean. Plain values, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

__all__ = [
    "LOWER_IS_BETTER",
    "Group",
    "Results",
    "TaskScore",
    "deciding_score",
    "example_scores",
    "goodness",
    "harness_example_scores",
    "macro_average",
    "macro_stderr",
    "macro_words",
    "main_metric",
    "mean_nll",
    "nats",
    "task_score",
]

Group = Literal["tasks", "extra", "harness"]

LOWER_IS_BETTER = frozenset({"nll", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score"})


class TaskScore(TypedDict):
    """One task's score."""

    score: float
    """Mean over the examples of ``metric``."""
    metric: str
    """acc, acc_bytes, exact_match, number_match, rougeL, verifier or nll; for a task of the harness its own."""
    n: int
    """Examples scored."""
    stderr: float | None
    """Standard error of the mean, as the harness computes it; None where it has none (one example, say)."""
    nll: float | None
    """Nats of the right completion, mean over examples, see `nats`; None where text was generated."""
    other: dict[str, float]
    """Further metrics of the same answers, e.g. ``acc_norm``."""
    group: Group
    """tasks: asked for; extra: scored but not trained on; harness: a task of lm-evaluation-harness itself."""
    left_out: NotRequired[int]
    """Examples that were not scored, as they are longer than the model's context; absent where there are none."""


class Results(TypedDict):
    """All scores of one model."""

    tasks: dict[str, TaskScore]
    """Name of the task -> its score; a task of the harness itself is named ``harness/…``."""
    macro: float | None
    """Mean score of the group ``tasks``, without those where lower is better; None where none is left."""
    macro_stderr: NotRequired[float | None]
    """Its standard error for test rows drawn anew; None where a task has none."""


def macro_average(scores: Mapping[str, TaskScore]) -> float | None:
    """Average the scores of the asked-for tasks, each task weighing the same.

    Nats per token have no common scale with accuracies, so tasks scored by them are left out.

    Example:
        >>> one = {"n": 9, "stderr": None, "nll": None, "other": {}, "group": "tasks"}
        >>> macro_average({"a": {"score": 0.5, "metric": "acc", **one}, "b": {"score": 1.0, "metric": "rougeL", **one}})
        0.75
    """
    kept = [score["score"] for score in _averaged(scores)]
    return sum(kept) / len(kept) if kept else None


def macro_stderr(scores: Mapping[str, TaskScore]) -> float | None:
    r"""The macro average's standard error, :math:`\frac1T \sqrt{\sum_t e_t^2}`: tasks have rows of their own.

    Example:
        >>> one = {"metric": "acc", "n": 9, "nll": None, "other": {}, "group": "tasks"}
        >>> macro_stderr({"a": {"score": 0.5, "stderr": 0.03, **one}, "b": {"score": 1.0, "stderr": 0.04, **one}})
        0.025
    """
    errors = [score["stderr"] for score in _averaged(scores)]
    known = [error for error in errors if error is not None]
    return sqrt(sum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None


def macro_words(results: Results | Mapping[str, Any]) -> str:
    """The macro average with its standard error.

    Example:
        >>> score = {"score": 0.5, "metric": "acc", "n": 4, "stderr": 0.25, "nll": None, "other": {}, "group": "tasks"}
        >>> macro_words({"tasks": {"a": score}, "macro": 0.5})
        '0.500 ±0.250'
    """
    error = macro_stderr(results["tasks"])
    return f"{results['macro']:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _averaged(scores: Mapping[str, TaskScore]) -> list[TaskScore]:
    """The scores that the macro average is made of."""
    return [s for s in scores.values() if s["group"] == "tasks" and s["metric"] not in LOWER_IS_BETTER]


def deciding_score(results: Results | Mapping[str, Any], by: Literal["macro", "worst"]) -> float:
    """The score by which the best of several adapters is chosen.

    Args:
        results: Scores of the trained tasks.
        by: ``macro``: the mean over the tasks where more is better, see `macro_average`; ``worst``: the lowest of them.
            Where all tasks are scored in nats, the mean or the highest of those.

    Example:
        >>> one = {"metric": "acc", "n": 9, "stderr": None, "nll": None, "other": {}, "group": "tasks"}
        >>> results = {"tasks": {"a": {"score": 0.5, **one}, "b": {"score": 1.0, **one}}, "macro": 0.75}
        >>> deciding_score(results, "macro"), deciding_score(results, "worst")
        (0.75, 0.5)
    """
    points = [score["score"] for score in _averaged(results["tasks"])]
    values = points or [score["score"] for score in results["tasks"].values() if score["group"] == "tasks"]
    return sum(values) / len(values) if by == "macro" else min(points) if points else max(values)


def goodness(results: Results | Mapping[str, Any], by: Literal["macro", "worst"]) -> float:
    """`deciding_score` as a number of which more is always better; what is no number is the worst."""
    score = deciding_score(results, by)
    sign = 1 if _averaged(results["tasks"]) else -1
    return -math.inf if math.isnan(score) else sign * score


def task_score(
    found: Mapping[str, Any], metric: str, *, n: int, nll: float | None = None, group: Group = "tasks"
) -> TaskScore:
    """Read one task's score out of the harness's results.

    Args:
        found: The harness's entry of the task: keys like ``acc,none`` and ``acc_stderr,none``.
        metric: Which of them is the score.
        n: Examples scored.
        nll: Nats of the right completions, where known.
        group: See `TaskScore`.

    Example:
        >>> task_score({"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "acc", n=2)["stderr"] is None
        True
    """
    values: dict[str, float] = {}
    for key, value in found.items():
        name, _, _filter = key.partition(",")
        if isinstance(value, int | float) and "," in key:
            values.setdefault(name, float(value))  # a task with several filters lists its main one first
    other = {k: v for k, v in sorted(values.items()) if k != metric and not k.endswith("_stderr")}
    return TaskScore(
        score=values[metric],
        metric=metric,
        n=n,
        stderr=values.get(f"{metric}_stderr"),
        nll=values[metric] if metric == "nll" else nll,
        other=other,
        group=group,
    )


def main_metric(found: Mapping[str, Any]) -> str:
    """Name the metric that a task of the harness lists first.

    Example:
        >>> main_metric({"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6})
        'acc'
    """
    names = [key.partition(",")[0] for key in found if "," in key]
    return next(name for name in names if not name.endswith("_stderr"))


def mean_nll(samples: Sequence[Mapping[str, Any]]) -> float:
    """Return the nats of the right choices, mean over examples; see `nats`.

    Args:
        samples: The harness's log of a multiple-choice task, whose documents have our column ``answer``.
    """
    return sum(map(_nats_of, samples)) / len(samples)


def nats(log_likelihoods: Sequence[float], right: int) -> float:
    r"""Return how surprising the right one of several choices is, given that it is one of them.

    .. math:: -\log \frac{p(c_\text{right})}{\sum_k p(c_k)}

    is log K for a model that knows nothing of K choices. Without the sum, most of it would be whether the model has
    found the form of an answer.

    Args:
        log_likelihoods: Of each choice, in nats.
        right: Which one is right.
    Example:
        >>> round(nats([-7.0, -7.0, -7.0], 1), 4)
        1.0986
    """
    highest = max(log_likelihoods)
    total = highest + math.log(sum(math.exp(value - highest) for value in log_likelihoods))
    return float(total - log_likelihoods[right])


def _nats_of(sample: Mapping[str, Any]) -> float:
    return nats([float(choice[0]) for choice in sample["filtered_resps"]], sample["doc"]["answer"])


def example_scores(samples: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return each example's own score, so that two models can be compared row by row.

    Args:
        samples: The harness's log of a task whose documents have our columns.
        metric: Which of its metrics is the score.

    Returns:
        For each example its ``id``, its ``score``, and the ``nll``: for multiple choice `nats` of the right choice,
        else nats per token of the completion and the end of text (None where text was generated).
    """
    found = []
    for sample in samples:
        doc = sample["doc"]
        nll = sample[metric] if metric == "nll" else None
        if "choices" in doc:
            nll = _nats_of(sample)
        found.append({"id": doc["id"], "score": float(sample[metric]), "nll": None if nll is None else float(nll)})
    return found


def harness_example_scores(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], score: TaskScore
) -> list[dict[str, Any]] | None:
    """Return each example's own score of a task of the harness, as `example_scores` does for ours.

    Args:
        samples: The harness's log, task -> its samples; several for a group.
        score: The task's score.

    Returns:
        For each example its ``id``, its ``score``, and None as its ``nll``. None as a whole where the score is no mean
        over examples (perplexity, corpus BLEU, a group that weighs its tasks alike): there is nothing to pair then.
    """
    rows: dict[str, dict[str, Any]] = {}
    for leaf, own in samples.items():
        for sample in own:  # a task with several filters lists its main one first
            value = sample.get(score["metric"])
            if not isinstance(value, int | float):
                return None
            name = f"{leaf}-{sample['doc_id']}"
            rows.setdefault(name, {"id": name, "score": float(value), "nll": None})
    mean = sum(row["score"] for row in rows.values()) / max(len(rows), 1)
    return list(rows.values()) if math.isclose(mean, score["score"], rel_tol=1e-6, abs_tol=1e-9) else None
