"""One mutant's tests in a process of their own: a fork, so that imports and collection are paid for once.

A fault inside a function is put into the function as it lives, in a fork of a process that has collected all tests. A
fault in what runs on import needs the import, in a fork of a process that has not imported the package yet.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from mutants_made import Mutant
from mutants_map import BUILD, COPY, QUIET, Recorded

_FUNCTION = 1  # the flag of a function's code, which a module's and a class's lack


def fork(work: Callable[[], str], limit: float) -> tuple[str, str]:
    """Do something in a fork: what it returns is empty for "survived", and else says what has "killed" it."""
    told = BUILD / "told"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        try:
            told.write_text(work())
        finally:
            os._exit(0)
    end, late = time.monotonic() + limit, False
    while not os.waitpid(child, os.WNOHANG)[0]:
        late = late or time.monotonic() > end
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what a test has started and a failure left behind
    if late:
        return "timeout", ""
    by = told.read_text() if told.exists() else "the process ended"
    return ("killed", by) if by else ("survived", "")


class Living:
    """A pytest plugin in place of running what was collected: each mutant's tests, in forks of this process."""

    def __init__(self, each: Callable[[Living], None]) -> None:
        self.each = each
        self.recorded = Recorded()
        self.items: dict[str, pytest.Item] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Hand over to the mutants."""
        self.items = {item.nodeid: item for item in session.items}
        session.config.pluginmanager.register(self.recorded)
        self.each(self)
        return True

    def fate(self, mutant: Mutant, text: str, tests: list[str], limit: float) -> tuple[str, str]:
        """Whether one of the tests fails on a function with a fault; "import" where it is in no living function.

        A function that has run already, for a table or a cache, may survive here and not when it is imported anew.
        """
        found = _living(mutant, text)
        chosen = [self.items[test] for test in tests if test in self.items]
        if not found or not chosen:
            return "import", ""

        def work() -> str:
            for function, code in found:
                function.__code__ = code
            for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.recorded.failed:
                    return self.recorded.failed[0]
            return ""

        return fork(work, limit)


def _living(mutant: Mutant, text: str) -> list[tuple[FunctionType, CodeType]]:
    """The functions that have a mutant's line, and the code with the fault for them."""
    file = str(COPY / mutant.path)
    old: CodeType = compile((COPY / mutant.path).read_text("utf-8"), file, "exec", dont_inherit=True)
    try:
        new: CodeType = compile(text, file, "exec", dont_inherit=True)
    except SyntaxError:
        return []
    while not old.co_flags & _FUNCTION:
        mine = [code for code in old.co_consts if isinstance(code, CodeType)]
        theirs = [code for code in new.co_consts if isinstance(code, CodeType)]
        inside = [place for place, code in enumerate(mine) if mutant.line in _lines(code)]
        if len(mine) != len(theirs) or not inside:
            return []
        old, new = mine[inside[-1]], theirs[inside[-1]]
    if old.co_freevars != new.co_freevars:
        return []
    return [
        (thing, new)
        for thing in gc.get_objects()
        if type(thing) is FunctionType
        and thing.__code__.co_filename == file
        and (thing.__code__.co_qualname, thing.__code__.co_firstlineno) == (old.co_qualname, old.co_firstlineno)
    ]


def _lines(code: CodeType) -> set[int]:
    own = {line for _, _, line in code.co_lines() if line}
    return own.union(*(_lines(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


class _Chosen:
    """A pytest plugin: keeps these tests of all that are collected, in their order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep and sort."""
        kept = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(kept, key=lambda item: self.place[item.nodeid])


def fate_on_import(mutant: Mutant, text: str, tests: list[str], limit: float) -> tuple[str, str]:
    """Whether one of the tests fails where the file itself has the fault."""

    def work() -> str:
        recorded = Recorded()
        files = sorted({test.partition("::")[0] for test in tests})
        code = pytest.main([*QUIET, "-x", *files], plugins=[_Chosen(tests), recorded])
        return recorded.failed[0] if recorded.failed else f"pytest ended with {code!r}" if code else ""

    with _changed(COPY / mutant.path, text):
        return fork(work, limit)


@contextlib.contextmanager
def _changed(path: Path, text: str) -> Iterator[None]:
    """Another text in a file of the copy; its byte code does not count meanwhile, and none of it is kept."""
    before, times = path.read_bytes(), path.stat()
    path.write_text(text, "utf-8")
    os.utime(path, (0, 0))
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
