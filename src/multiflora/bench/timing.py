"""Side-by-side timing: every competitor runs once a round, in an order drawn anew for each round.

On a machine that others use as well, two runs minutes apart do not compare. Samples taken within one round do, and the
changing order keeps any competitor from always following the same one (whose leavings fill the caches).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from multiflora.bench.results import Clock, Samples

__all__ = ["CLOCKS", "Phases", "interleave", "samples", "stopwatch", "threads"]

Phases = dict[str, dict[Clock, float]]
"""Seconds of each phase of one run, by clock: ``{"forward": {"wall": ..., "cpu": ...}, ...}``."""

CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``wall`` is what a user waits; ``cpu`` leaves out what the scheduler gave to others (meaningful with one thread)."""


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run torch on so many threads inside; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stopwatch(device: torch.device) -> Callable[[], dict[Clock, float]]:
    """A function that returns seconds since it was last called, by every clock, when all work on the device is done."""
    last = {name: clock() for name, clock in CLOCKS.items()}

    def lap() -> dict[Clock, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = {name: clock() for name, clock in CLOCKS.items()}
        passed = {name: now[name] - last[name] for name in CLOCKS}
        last.update(now)
        return passed

    return lap


def interleave(
    competitors: Mapping[str, Callable[[], Phases]],
    rounds: int,
    *,
    warmup: int = 1,
    seed: int = 0,
    after_round: Callable[[], None] | None = None,
) -> dict[str, list[Phases]]:
    """Run all competitors once a round.

    Args:
        competitors: Each does one run and returns its phases.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
        seed: Of the order in each round.
        after_round: Called after every round, to report progress.

    Returns:
        The runs of each competitor, in the order of the rounds.
    """
    order, draw = list(competitors), random.Random(seed)
    taken: dict[str, list[Phases]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            draw.shuffle(order)
            for name in order:
                phases = competitors[name]()
                if number >= 0:
                    taken[name].append(phases)
            gc.collect()
            if after_round is not None:
                after_round()
    finally:
        if collecting:
            gc.enable()
    return taken


def samples(runs: Mapping[str, list[Phases]]) -> Samples:
    """The runs of :func:`interleave` the way results hold them: by competitor, phase and clock."""
    return {
        name: {
            phase: {clock: [run[phase][clock] for run in taken] for clock in clocks}
            for phase, clocks in taken[0].items()
        }
        for name, taken in runs.items()
    }
