"""The mixture: how often each task is drawn, in which order, reproducibly and from any position on.

The order is a pure function of the seed and the epoch, so resuming is reading on from a position; nothing is
stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from multiflora.errors import ConfigError

__all__ = ["Mixture", "Strategy", "allocate", "task_rates"]

Strategy = Literal["weights", "size", "capped", "temperature", "equal"]
Integers: TypeAlias = npt.NDArray[np.int64]

# First words of the seeds below: every draw has a stream of its own
_ORDER, _ROWS = 0, 1


def task_rates(
    strategy: Strategy,
    sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 2.0,
    cap: int | None = None,
) -> list[float]:
    r"""Return each task's share of the mixture; the shares sum to 1.

    .. math:: p_t \propto w_t,\quad n_t,\quad \min(n_t, K),\quad n_t^{1/T},\quad 1

    for ``weights``, ``size``, ``capped``, ``temperature`` and ``equal``; the middle three are the mixtures of
    Raffel et al. 2020 (arXiv:1910.10683, section 3.5.2), where temperature mixing caps the sizes too if a cap
    is given.

    Args:
        strategy: Which of the five.
        sizes: Examples of each task.
        weights: w, one per task; only ``weights`` reads them.
        temperature: T; 1 is by size, large is equal.
        cap: K, in examples; for ``capped``, and optional for ``temperature``.
    Raises:
        ConfigError: A weight or a cap was set that the strategy would ignore, or a cap is missing.
    Example:
        >>> task_rates("temperature", [100, 400], temperature=2.0)
        [0.3333333333333333, 0.6666666666666666]
    """
    given = list(weights) if weights is not None else [1.0] * len(sizes)
    if strategy != "weights" and any(weight != 1.0 for weight in given):
        raise ConfigError(
            f"Tasks have weights ({', '.join(f'{w:g}' for w in given)}), but mixture.strategy is "
            f"{strategy!r}, which ignores them. Set mixture.strategy to 'weights', or remove the weights."
        )
    if cap is not None and strategy not in {"capped", "temperature"}:
        raise ConfigError(
            f"mixture.cap is {cap}, but mixture.strategy is {strategy!r}, which ignores it. Set "
            "mixture.strategy to 'capped' or 'temperature', or remove the cap."
        )
    if strategy == "capped" and cap is None:
        raise ConfigError("mixture.strategy 'capped' needs mixture.cap, the most examples one task may count for.")
    capped = [float(size if cap is None else min(size, cap)) for size in sizes]
    shares = {
        "weights": given,
        "size": [float(size) for size in sizes],
        "capped": capped,
        "temperature": [size ** (1 / temperature) for size in capped],
        "equal": [1.0] * len(sizes),
    }[strategy]
    total = sum(shares)
    return [share / total for share in shares]


def allocate(rates: Sequence[float], total: int) -> list[int]:
    """Split ``total`` examples among tasks in proportion to their rates, by largest remainder.

    Every task gets at least one example where there are enough for that.

    Args:
        rates: Shares of the tasks, positive.
        total: Examples to hand out.
    Example:
        >>> allocate([0.5, 0.3, 0.2], 9)
        [4, 3, 2]
    """
    least = 1 if total >= len(rates) else 0
    spare = total - least * len(rates)
    wanted = np.asarray(rates, dtype=np.float64) * total / sum(rates) - least
    wanted = np.maximum(wanted, 0.0)
    wanted *= spare / wanted.sum() if wanted.sum() else 0.0
    counts = np.floor(wanted).astype(np.int64)
    remainder = spare - int(counts.sum())
    first = np.argsort(-(wanted - counts), kind="stable")[:remainder]
    counts[first] += 1
    return [int(count) + least for count in counts]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A seeded, endless stream of examples from several tasks, epoch after epoch.

    Examples are numbered as in the concatenation of the tasks. Within an epoch every task has exactly its
    count, in shuffled order. A task is walked through in seeded permutations, so no row comes twice before
    every row came once; with ``resample`` the next epoch walks on where the last one stopped, else every
    epoch takes the same rows anew.

    Example:
        >>> Mixture(names=("a", "b"), sizes=(2, 4), counts=(3, 3), seed=0).plan(6)
        array([4, 1, 2, 3, 0, 1])
    """

    names: tuple[str, ...]
    """Names of the tasks."""
    sizes: tuple[int, ...]
    """Examples each task has."""
    counts: tuple[int, ...]
    """Examples of each task in one epoch."""
    seed: int
    """Seed of the order and of the rows."""
    resample: bool = True
    """Take further rows in every epoch, instead of the same ones."""

    @property
    def epoch_size(self) -> int:
        """Examples in one epoch."""
        return sum(self.counts)

    def epoch(self, number: int) -> Integers:
        """Return the examples of one epoch in order: always the same for one seed and number."""
        first = np.cumsum([0, *self.sizes])
        lap = number if self.resample else 0
        rows = [
            first[task] + _walk(size, lap * count, count, (self.seed, _ROWS + task))
            for task, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True))
        ]
        order = np.random.default_rng((self.seed, _ORDER, number)).permutation(self.epoch_size)
        return np.concatenate(rows)[order]

    def plan(self, num_examples: int, start: int = 0) -> Integers:
        """Return the examples at positions ``start`` to ``start + num_examples`` of the endless stream.

        So a run that was stopped after n examples reads on with ``start=n``, and a longer run begins as a
        shorter one.
        """
        if num_examples <= 0:
            return np.empty(0, dtype=np.int64)
        epochs = range(start // self.epoch_size, (start + num_examples - 1) // self.epoch_size + 1)
        stream = np.concatenate([self.epoch(number) for number in epochs])
        offset = start - epochs.start * self.epoch_size
        return stream[offset : offset + num_examples]

    def report(self, plan: Integers, lengths: Integers, loss_tokens: Integers) -> dict[str, dict[str, Any]]:
        """Count what a plan holds of each task: examples, tokens, shares, and passes over the task.

        Args:
            plan: Examples in order, as `plan` returns them.
            lengths: Length of every example of the concatenation, in tokens.
            loss_tokens: Tokens of every example that carry loss.
        """
        task_of = np.repeat(np.arange(len(self.sizes)), self.sizes)[plan]
        all_tokens, all_loss = max(int(lengths[plan].sum()), 1), max(int(loss_tokens[plan].sum()), 1)
        report: dict[str, dict[str, Any]] = {}
        for task, name in enumerate(self.names):
            mine = plan[task_of == task]
            tokens, with_loss = int(lengths[mine].sum()), int(loss_tokens[mine].sum())
            report[name] = {
                "examples": len(mine),
                "share_of_examples": len(mine) / max(len(plan), 1),
                "tokens": tokens,
                "share_of_tokens": tokens / all_tokens,
                "loss_tokens": with_loss,
                "share_of_loss_tokens": with_loss / all_loss,
                "distinct_examples": len(np.unique(mine)),
                "available_examples": self.sizes[task],
                "passes": len(mine) / self.sizes[task],
            }
        return report


def _walk(size: int, start: int, count: int, seed: tuple[int, int]) -> Integers:
    """Return ``count`` rows from position ``start`` of an endless walk through seeded permutations."""
    laps = range(start // size, -(-(start + count) // size))
    if not laps:
        return np.empty(0, dtype=np.int64)
    walk = np.concatenate([np.random.default_rng((*seed, lap)).permutation(size) for lap in laps])
    return walk[start - laps.start * size :][:count]
