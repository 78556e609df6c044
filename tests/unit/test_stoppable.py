"""Work that does not end is stopped, from outside; plain values and nothing else go either way."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from multiflora.errors import EnvironmentProblem
from multiflora.stoppable import Closed, StoppedError, _Reader, run

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
    kind, value = run("multiflora.tasks.jinja:rendered", "{{ a }}", False, shared={"a": np.ones(2)})
    assert (kind, type(value)) == ("no text", Closed)
    with pytest.raises(TypeError, match="a value of type ndarray is no text"):
        str(value)


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


WINDOWS = """
import signal, sys
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("setitimer", "SIGPROF", "SIGALRM", "SIGKILL"):
    delattr(signal, name)
"""


def test_where_the_system_has_neither_limits_nor_timers_time_is_bounded_all_the_same(tmp_path):
    """Windows, as Python shows it: in the process that asks, and in the one that works."""
    python = tmp_path / "python"
    (tmp_path / "windows.py").write_text(WINDOWS, "utf-8")
    start = f"exec(open('{tmp_path}/windows.py').read())"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -c "{start}\n$3"\n', "utf-8")
    python.chmod(0o755)
    code = f"""import peft, transformers.trainer  # which know the system by its name
{WINDOWS}
import logging, os, multiflora, multiflora.training.output, multiflora.comparison.run
from multiflora import stoppable
logging.basicConfig(format="%(message)s", stream=sys.stdout)
sys.executable, stoppable.SECONDS, stoppable.WAITING = {str(python)!r}, 0.2, 1
for function, arguments in (("operator:add", (1, 2)), ("builtins:pow", (10, 10**9)), ("operator:add", (2, 2))):
    try:
        print(stoppable.run(function, *arguments))
    except stoppable.StoppedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told, *answers = done.stdout.splitlines()
    assert told.startswith("This system does not limit the memory of a process")
    assert answers == ["3", "it takes more than 0.2 seconds", "4"]


def test_a_python_that_does_not_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("multiflora.stoppable._running", None)
    for program in ("/bin/false", str(tmp_path / "absent")):
        monkeypatch.setattr("sys.executable", program)
        with pytest.raises(EnvironmentProblem, match="No process could be started"):
            run("operator:add", 1, 2)
