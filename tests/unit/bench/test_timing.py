"""Competitors run once a round, in an order that changes and comes back."""

from __future__ import annotations

import gc

import torch

from multiflora.bench.timing import interleave, samples, stopwatch, threads

CPU = torch.device("cpu")


def run_all(**words):
    order = []

    def competitor(name):
        def run():
            order.append(name)
            return {"forward": {"cpu": float(len(order)), "wall": 0.0}}

        return run

    taken = interleave({name: competitor(name) for name in "abc"}, **words)
    return order, taken


def test_every_round_has_every_competitor_once():
    order, taken = run_all(rounds=5, warmup=2)
    assert len(order) == 3 * 7
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 21, 3))
    assert [len(runs) for runs in taken.values()] == [5, 5, 5]
    assert len({tuple(order[i : i + 3]) for i in range(0, 21, 3)}) > 1


def test_the_order_comes_back_with_its_seed():
    assert run_all(rounds=6)[0] == run_all(rounds=6)[0]
    assert run_all(rounds=6)[0] != run_all(rounds=6, seed=1)[0]


def test_warm_up_does_not_count():
    _, taken = run_all(rounds=1, warmup=3)
    assert all(run["forward"]["cpu"] > 9 for (run,) in taken.values())


def test_every_round_is_reported_and_the_collector_comes_back():
    calls = []
    run_all(rounds=2, warmup=1, after_round=lambda: calls.append(gc.isenabled()))
    assert calls == [False, False, False]
    assert gc.isenabled()


def test_samples_by_competitor_phase_and_clock():
    _, taken = run_all(rounds=2, warmup=0)
    found = samples(taken)
    assert sorted(value for name in "abc" for value in found[name]["forward"]["cpu"]) == [1, 2, 3, 4, 5, 6]


def test_a_stopwatch_counts_from_the_last_lap():
    lap = stopwatch(CPU)
    torch.ones(1000).sum()
    assert all(seconds >= 0 for seconds in lap().values())
    assert set(lap()) == {"wall", "cpu"}


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
