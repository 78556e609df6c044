"""The laws of the mixture: shares, coverage, repetition from the seed, reading on from any position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiflora.data.mixture import Mixture, allocate, task_rates
from multiflora.errors import ConfigError

sizes_of_tasks = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sizes = draw(sizes_of_tasks)
    counts = draw(st.lists(st.integers(0, 60), min_size=len(sizes), max_size=len(sizes)).filter(any))
    return Mixture(
        names=tuple(f"t{i}" for i in range(len(sizes))),
        sizes=tuple(sizes),
        counts=tuple(counts),
        seed=draw(st.integers(0, 2**32 - 1)),
        resample=draw(st.booleans()),
    )


def tasks_of(mixture: Mixture, plan: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(mixture.sizes)), mixture.sizes)[plan]


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        ("equal", {}, [1 / 3, 1 / 3, 1 / 3]),
        ("size", {}, [10 / 510, 100 / 510, 400 / 510]),
        ("capped", {"cap": 100}, [10 / 210, 100 / 210, 100 / 210]),
        ("temperature", {"temperature": 1.0}, [10 / 510, 100 / 510, 400 / 510]),
        ("temperature", {"temperature": 2.0, "cap": 40}, np.sqrt([10, 40, 40]) / np.sqrt([10, 40, 40]).sum()),
        ("weights", {"weights": [1.0, 2.0, 5.0]}, [1 / 8, 2 / 8, 5 / 8]),
    ],
)
def test_rates_follow_the_strategy(strategy: str, options: dict[str, object], expected: list[float]) -> None:
    assert task_rates(strategy, [10, 100, 400], **options) == pytest.approx(list(expected))


def test_a_very_high_temperature_is_equal() -> None:
    assert task_rates("temperature", [10, 400], temperature=1e6) == pytest.approx([0.5, 0.5], abs=1e-5)


def test_a_weight_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights \(1, 2\), but mixture.strategy is 'size', which ignores them"):
        task_rates("size", [3, 3], weights=[1.0, 2.0])


def test_a_cap_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mixture.cap is 5, but mixture.strategy is 'equal', which ignores it"):
        task_rates("equal", [3, 3], cap=5)


def test_capped_without_a_cap_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'capped' needs mixture.cap"):
        task_rates("capped", [3, 3])


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.integers(0, 500))
def test_allocation_hands_out_everything_in_proportion(rates: list[float], total: int) -> None:
    counts = allocate(rates, total)
    assert sum(counts) == total
    assert min(counts) >= (1 if total >= len(rates) else 0)
    ideal = [rate / sum(rates) * total for rate in rates]
    if min(ideal) >= 1:
        assert all(abs(count - share) < 1 + 1e-9 for count, share in zip(counts, ideal, strict=True))


@given(mixtures(), st.integers(0, 3))
def test_every_epoch_holds_each_task_exactly_its_count(mixture: Mixture, epoch: int) -> None:
    tasks = tasks_of(mixture, mixture.epoch(epoch))
    assert np.bincount(tasks, minlength=len(mixture.sizes)).tolist() == list(mixture.counts)


@given(mixtures())
def test_no_example_comes_again_before_all_of_its_task_came(mixture: Mixture) -> None:
    seen = np.concatenate([mixture.epoch(0), mixture.epoch(1)]) if mixture.resample else mixture.epoch(0)
    times = np.bincount(seen, minlength=sum(mixture.sizes))
    for rows in np.split(times, np.cumsum(mixture.sizes)[:-1]):
        assert rows.max() - rows.min() <= 1


@given(mixtures(), st.integers(0, 150), st.integers(0, 150))
def test_reading_on_from_a_position_gives_the_rest_of_the_stream(mixture: Mixture, start: int, more: int) -> None:
    whole = mixture.plan(start + more)
    assert mixture.plan(start).tolist() == whole[:start].tolist()
    assert mixture.plan(more, start=start).tolist() == whole[start:].tolist()


@given(mixtures(), st.integers(0, 100))
def test_the_same_seed_gives_the_same_stream(mixture: Mixture, length: int) -> None:
    again = Mixture(**vars(mixture))
    assert again.plan(length).tolist() == mixture.plan(length).tolist()


def test_seeds_and_epochs_differ_in_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Mixture(names=("a",), sizes=(50,), counts=(50,), seed=seed).epoch(epoch).tolist()

    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_resampling_takes_new_rows_and_its_absence_the_same_ones() -> None:
    def rows(resample: bool, epoch: int) -> set[int]:
        mixture = Mixture(names=("a", "b"), sizes=(100, 10), counts=(10, 10), seed=3, resample=resample)
        return set(mixture.epoch(epoch)) & set(range(100))

    assert rows(True, 0).isdisjoint(rows(True, 1))
    assert rows(False, 0) == rows(False, 1)
    assert len(rows(True, 0)) == 10


def test_the_report_counts_what_the_plan_holds() -> None:
    mixture = Mixture(names=("a", "b"), sizes=(2, 4), counts=(4, 2), seed=0)
    lengths, loss_tokens = np.array([10, 10, 5, 5, 5, 5]), np.array([1, 1, 2, 2, 2, 2])
    report = mixture.report(mixture.plan(6), lengths, loss_tokens)
    assert report["a"] == {
        "examples": 4,
        "share_of_examples": 4 / 6,
        "tokens": 40,
        "share_of_tokens": 0.8,
        "loss_tokens": 4,
        "share_of_loss_tokens": 0.5,
        "distinct_examples": 2,
        "available_examples": 2,
        "passes": 2.0,
    }
    assert report["b"]["tokens"] == 10
    assert report["b"]["distinct_examples"] == 2
