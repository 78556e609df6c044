"""What a run writes comes back, and anything else is refused in words."""

from __future__ import annotations

import pytest

from multiflora.bench.results import load, save
from multiflora.errors import DataError

from .made_results import machine, results


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "bench.json"
    save(results(), path)
    assert load(path) == results()
    first = path.read_bytes()
    save(load(path), path)
    assert path.read_bytes() == first


def test_seconds_are_rounded_to_a_tenth_of_a_microsecond(tmp_path):
    from multiflora.bench.results import SharedCase

    case = SharedCase(
        model="m", layers="q", tokens=1, dtype="float32", seconds={"apart": {"forward": {"cpu": [1.23456789]}}}
    )
    assert case.seconds["apart"]["forward"]["cpu"] == [1.2345679]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no result of `multiflora bench`: the whole file"),
        ('{"format": 2, "command": "x"}', "is no result of `multiflora bench`: format"),
        ('{"format": 1, "command": "x", "machine": {"kind": "cpu"}}', "machine.device: Field required"),
    ],
)
def test_another_file_is_refused(tmp_path, text, words):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("changes", "clock"), [({}, "cpu"), ({"threads": 2}, "wall"), ({"kind": "cuda"}, "wall")], ids=str
)
def test_the_clock_is_the_process_own_where_that_means_something(changes, clock):
    assert results(machine=machine(**changes)).clock == clock


def test_memory_divides_into_what_grows_and_what_does_not():
    (case,) = results().memory
    assert (case.per_token("packed"), case.constant("packed")) == (1.0, 1000.0)
