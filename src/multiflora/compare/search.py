"""The search for a learning rate: optuna proposes, finished trials are read back from their cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from multiflora.errors import EnvironmentProblem

__all__ = ["best_rate", "loss_of", "propose"]

Trial = tuple[float, float | None]
"""A learning rate, and the loss it came to; None where the training diverged."""

_HAS_NLL = ("acc", "acc_bytes", "nll")
_WORST = 1e9  # optuna has no word for a diverged training that keeps it from coming back there


def propose(trials: Sequence[Trial], low: float, high: float, *, first: float, number: int, seed: int) -> float:
    """Return the learning rate of the next trial.

    The proposal is a function of the trials so far, so an interrupted search goes on as if it had not stopped: half of
    the trials at random, then a tree of Parzen estimators (optuna's default sampler), on a logarithmic scale.

    Args:
        trials: The finished ones, in order.
        low: Smallest learning rate.
        high: Largest.
        first: Tried first: what the method is usually trained with.
        number: Trials in all.
        seed: Of the draws.

    Raises:
        EnvironmentProblem: optuna is not installed.
    """
    if not trials:
        return min(max(first, low), high)
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler(seed=seed + len(trials), n_startup_trials=max(2, number // 2))
    study = optuna.create_study(sampler=sampler, direction="minimize")
    range_ = optuna.distributions.FloatDistribution(low, high, log=True)
    for rate, loss in trials:
        value = _WORST if loss is None else loss
        study.add_trial(
            optuna.trial.create_trial(
                params={"learning_rate": rate}, distributions={"learning_rate": range_}, value=value
            )
        )
    proposed: float = study.ask({"learning_rate": range_}).params["learning_rate"]
    # four digits say all there is to say, and read well
    return min(max(float(f"{proposed:.4g}"), low), high)


def best_rate(trials: Sequence[Trial]) -> float:
    """The learning rate with the lowest loss; the smallest one where none came to a number."""
    return min(trials, key=lambda trial: (math.inf if trial[1] is None else trial[1], trial[0]))[0]


def loss_of(cell: Mapping[str, Any]) -> float | None:
    """What a trial is judged by: nats per token of the right completions, mean over tasks; None if it diverged.

    Where no task has them (all answers are generated), one minus the macro score.
    """
    scores = cell["scores"]["tasks"]
    nats = [rows["nll"] for name, rows in cell["rows"].items() if scores[name]["metric"] in _HAS_NLL]
    if any(None in values for values in nats):
        return None
    if nats:
        return float(sum(sum(values) / len(values) for values in nats) / len(nats))
    macro: float | None = cell["scores"]["macro"]
    return None if macro is None else 1 - macro


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentProblem(
            "compare.learning_rate needs optuna to propose learning rates, and it is not installed: "
            "pip install 'multiflora[compare]'. Or remove the section and set train.learning_rate."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
