"""Work that does not end is stopped, from outside; plain values and nothing else go either way."""

from __future__ import annotations

import io
import os
import pickle
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from multiflora.stoppable import StoppedError, _Reader, run

SAME = {"n": [None, True, 1, 10**40, 1.5, float("inf"), "é", "\ud800", b"x"], "of": {"date": (date(2026, 1, 2),)}}


def test_plain_values_arrive_as_they_were():
    value = {**SAME, "at": datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=1))), "d": Decimal("1.10")}
    assert run("copy:copy", value) == value


def test_what_only_resembles_a_plain_value_becomes_one():
    found = run("copy:copy", [np.float64(1.5), np.int64(3), range(2), datetime(2026, 1, 2, tzinfo=ZoneInfo("UTC"))])
    assert [type(item) for item in found] == [float, int, list, datetime]
    assert found[:3] == [1.5, 3, [0, 1]]
    assert found[3].utcoffset() == timedelta(0)


def test_any_other_value_is_closed():
    with pytest.raises(ValueError, match="a value of type ndarray is no text"):
        run("multiflora.tasks.jinja:rendered", "{{ a }}", False, shared={"a": np.ones(2)})


class Evil:
    def __reduce__(self):
        return os.getcwd, ()


def test_an_answer_cannot_bring_code():
    with pytest.raises(pickle.UnpicklingError, match="is no plain value"):
        _Reader(io.BytesIO(pickle.dumps(Evil()))).load()


@pytest.mark.parametrize(
    ("function", "arguments", "why"),
    [
        ("operator:mul", ("a", 10**12), "MiB of memory"),
        ("builtins:pow", (10, 10**9), r"more than 0\.2 seconds"),
        ("re:fullmatch", ("(a+)+", "a" * 40 + "b"), r"more than 0\.2 seconds"),
    ],
)
def test_what_is_too_much_is_stopped_and_the_next_call_is_served(monkeypatch, function, arguments, why):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.2)
    with pytest.raises(StoppedError, match=why):
        run(function, *arguments)
    assert run("operator:add", 1, 2) == 3


def test_a_result_that_is_too_long_is_said(monkeypatch):
    with pytest.raises(StoppedError, match="more than 67,108,864 bytes"):
        run("operator:mul", "a", 70 * 2**20)


def test_values_too_deep_to_write_are_said():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep within one another"):
        run("copy:copy", deep)
    assert run("operator:add", 1, 2) == 3


def test_a_shared_argument_is_sent_once_and_again_after_a_stop(monkeypatch):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.2)
    row = {"n": 3}
    assert run("operator:getitem", "n", shared=row) == run("operator:getitem", "n", shared=row) == 3
    with pytest.raises(StoppedError):
        run("builtins:pow", 10, 10**9)
    assert run("operator:getitem", "n", shared=row) == 3


def test_a_fork_has_a_process_of_its_own():
    assert run("operator:add", 1, 2) == 3
    child = os.fork()
    if child == 0:
        os._exit(0 if run("operator:add", 2, 2) == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run("operator:add", 1, 3) == 4


def test_nothing_in_the_current_folder_or_the_environment_is_imported(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("multiflora.stoppable._running", None)
    assert run("multiflora.tasks.jinja:rendered", "{{ a }}", False, shared={"a": 1}) == ("value", "1")
