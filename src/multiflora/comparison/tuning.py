"""Whether a method's learning rate was tuned, from the trainings that tried some: pure functions on plain values.

A comparison of methods at rates that suit one of them says nothing of the methods. So a verdict rests on this: a method
is *tuned* if its best rate has a worse one on both sides; *at the edge* if its best is the smallest or the largest that
was tried; *not tuned* if a single rate is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Side", "State", "Trial", "Tuning", "decide", "missing", "not_tuned", "waits_for"]

State = Literal["tuned", "at the edge", "not tuned"]
Side = Literal["below", "above"]
"""Of the chosen rate."""


class Trial(NamedTuple):
    """What one training with one learning rate came to on the validation rows."""

    rate: float
    seed: int
    score: float | None
    """Macro score of the tasks where more is better, a share; None where there are none, or where it diverged."""
    loss: float | None
    """Nats per token of the right completions, mean over the tasks that have them; None as above."""
    error: float | None = None
    """Standard error of the score, over the validation rows."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How well a method's learning rate is known."""

    state: State
    chosen: float
    """The learning rate that the method is compared with."""
    tried: tuple[Trial, ...] = ()
    """Every training of the search, by learning rate and seed."""
    open: tuple[Side, ...] = ()
    """Sides of the chosen rate on which no worse one is known."""
    max_steps: int | None = None
    """Optimiser steps of a trial, where they were fewer than those of the comparison; None: trials ran in full."""


def not_tuned(rate: float) -> Tuning:
    """A method that is trained with a rate nobody compared with others."""
    return Tuning(state="not tuned", chosen=rate, open=("below", "above"))


def decide(trials: Sequence[Trial], max_steps: int | None = None) -> Tuning:
    """Choose the best learning rate, and say whether it lies between worse ones.

    The best has the lowest loss among the rates whose mean score is within one standard error of the highest: so
    few rows cannot tell scores that are closer, and the loss can. A rate at which a training diverged is the worst.

    Args:
        trials: At least one; every rate with the same seeds.
        max_steps: Steps of the trials, if fewer than the comparison's.

    Example:
        >>> found = decide([Trial(1e-3, 0, 0.5, 1.0), Trial(3e-3, 0, 0.6, 0.9), Trial(1e-2, 0, 0.4, 1.2)])
        >>> found.state, found.chosen
        ('tuned', 0.003)
        >>> decide([Trial(1e-3, 0, 0.5, 1.0), Trial(3e-3, 0, 0.6, 0.9)]).open
        ('above',)
    """
    by_rate: dict[float, list[Trial]] = {}
    for trial in trials:
        by_rate.setdefault(trial.rate, []).append(trial)
    scores = {rate: _score(own) for rate, own in sorted(by_rate.items())}
    best = max(scores, key=lambda rate: scores[rate])
    enough = scores[best] - _mean([trial.error for trial in by_rate[best]])
    # close scores count as one, and the loss decides among them
    worth = {rate: (min(score, enough), -_mean([t.loss for t in by_rate[rate]])) for rate, score in scores.items()}
    chosen = max(worth, key=lambda rate: worth[rate])  # of equal ones the first, which is the smallest
    worse = [rate for rate in worth if worth[rate] < worth[chosen]]
    diverged = scores[best] == -math.inf  # where all did, only a smaller rate can help
    sides: dict[Side, bool] = {
        "below": any(r < chosen for r in worse),
        "above": diverged or any(r > chosen for r in worse),
    }
    open_sides = tuple(side for side, closed in sides.items() if not closed)
    state: State = "tuned" if not open_sides else "at the edge" if len(worth) > 1 else "not tuned"
    return Tuning(
        state=state,
        chosen=chosen,
        tried=tuple(sorted(trials, key=lambda trial: (trial.rate, trial.seed))),
        open=open_sides,
        max_steps=max_steps,
    )


def missing(label: str, reference: str, tunings: Mapping[str, Tuning], command: str) -> str:
    """Say what a verdict on two methods waits for, and the command that adds it; nothing if both are tuned.

    Args:
        label: The method.
        reference: The baseline.
        tunings: Label -> how well its rate is known; a method that is not there is not tuned.
        command: What goes on with the comparison.

    Example:
        >>> print(missing("rlora", "lora", {}, "multiflora compare c.yaml"))  # doctest: +NORMALIZE_WHITESPACE
        the learning rates of rlora and lora are not tuned, only one was tried (multiflora compare c.yaml --set
        compare.learning_rate.trials=5 tries others)
    """
    return waits_for((label, reference), tunings, command)


def waits_for(names: Sequence[str], tunings: Mapping[str, Tuning], command: str) -> str:
    """The same for any number of methods."""
    untuned = [name for name in names if name not in tunings or tunings[name].state == "not tuned"]
    at_edge = [name for name in names if name in tunings and tunings[name].state == "at the edge"]
    parts = []
    if untuned:
        which = "rates of" if len(untuned) > 1 else "rate of"
        verb = "are" if len(untuned) > 1 else "is"
        parts.append(f"the learning {which} {_listed(untuned)} {verb} not tuned, only one was tried")
    parts += [f"the best learning rate of {name}, {_edge(tunings[name])}" for name in at_edge]
    if not parts:
        return ""
    # a wider grid holds all that an edge needs, and begins a search where there was none
    number = 5 if untuned else 2 * len({trial.rate for name in at_edge for trial in tunings[name].tried})
    setting = f"compare.learning_rate.{'trials' if untuned else 'grow'}={number}"
    return f"{'; '.join(parts)} ({command} --set {setting} tries others)"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _edge(tuning: Tuning) -> str:
    """Which edge, in words."""
    where = "smallest" if tuning.open == ("below",) else "largest" if tuning.open == ("above",) else "only useful"
    return f"{tuning.chosen:.3g}, is the {where} one that was tried"


def _score(own: Sequence[Trial]) -> float:
    """A rate's mean score over seeds; the worst there is if one of them diverged."""
    diverged = any(trial.score is None and trial.loss is None for trial in own)
    return -math.inf if diverged else _mean([trial.score for trial in own])


def _mean(values: Sequence[float | None]) -> float:
    """Mean; 0 where the trials do not have this measure."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
