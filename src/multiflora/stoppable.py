"""Work that may not end, in a process that the system stops: so much processor time, so much memory, and no more.

What a file from anybody asks for (a template, a regular expression, a Parquet file by its layout) can be short and
still run for a year or fill the memory, often inside one call of C that nothing in Python can break off. So it runs in
a process of its own. The kernel ends that process at `SECONDS` of processor time for one piece of work (a busy machine
does not count) and gives it no more than `MEMORY`. The process is started once and serves all calls, so that a row
costs a fraction of a millisecond.
Where the system does not limit memory (macOS, Windows), that is said once; where it has no timers either (Windows), the
process ends itself by the clock.

Only plain values go either way: a value of any other type arrives as a `Closed`, which has nothing to look at.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import io
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, BinaryIO

from multiflora.errors import EnvironmentProblem

log = logging.getLogger(__name__)

__all__ = ["MEMORY", "SECONDS", "Closed", "StoppedError", "restart_clock", "run", "uncollected"]

SECONDS = 2.0
"""Processor time for one piece of work."""
WAITING = 3
"""Time on the clock, as a multiple of that: for work that waits for a disk, on a machine that is not idle."""
MEMORY = 512 * 2**20
"""Bytes of address space that the work may take, beside what is taken by the modules that do it."""
LONGEST = 64 * 2**20
"""Bytes of the longest result."""

_TIMERS = [getattr(signal, name) for name in ("SIGPROF", "SIGALRM") if hasattr(signal, name)]
_HEAD = struct.Struct("<Q")
# what finding Python's own libraries may need, and the time of day
_SHARED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


class StoppedError(ValueError):
    """The work was stopped: it took too long, or too much memory, or would have given too much."""


class Closed:
    """Stands for a value that is no plain one, such as an image: only its type's name has come along."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __str__(self) -> str:
        raise TypeError(f"a value of type {self.kind} is no text")

    __repr__ = __format__ = __str__  # type: ignore[assignment]


_PLAIN: tuple[type, ...] = (str, int, float, complex, dict, list, set, frozenset, bytearray, Decimal, Closed)
_TIMES: tuple[type, ...] = (date, datetime, time, timedelta, timezone)
_CLASSES: Mapping[tuple[str, str], type] = {(k.__module__, k.__qualname__): k for k in (*_PLAIN, *_TIMES)}


class _Reader(pickle.Unpickler):
    """Makes plain values and nothing else, whoever wrote the bytes."""

    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
        return found


class _Writer(pickle.Pickler):
    """Writes plain values; what only resembles one is made one, and the rest is closed."""

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        is_plain = kind in _CLASSES.values() and getattr(value, "tzinfo", None) is None
        if is_plain or (isinstance(value, type) and value in _CLASSES.values()):
            return NotImplemented
        if isinstance(value, str):
            return str, (str.__str__(value),)
        if isinstance(value, Integral):  # a subclass, as enumerations and numpy's numbers are
            return int, (int(value),)
        if isinstance(value, Real):
            return float, (float(value),)
        if isinstance(value, datetime):
            return datetime, (*value.timetuple()[:6], value.microsecond, _offset(value))
        if isinstance(value, time):
            return time, (value.hour, value.minute, value.second, value.microsecond)
        if isinstance(value, Mapping):
            return dict, (list(value.items()),)
        if isinstance(value, Sequence | Iterator):
            return list, (list(value),)
        return Closed, (kind.__name__,)


def _offset(value: datetime) -> tzinfo | None:
    """A time zone as its offset at that moment: the rules of the zone do not matter any more."""
    offset = value.utcoffset()
    return None if offset is None else timezone(offset)


@contextmanager
def uncollected() -> Iterator[None]:
    """Make many values in a block without the search for garbage among them.

    Python looks through all it holds whenever so many lists and dicts have been made; where a file makes them, none is
    garbage, and a row of a million lists spends nine tenths of its time on that.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _packed(value: Any) -> bytes:
    written = io.BytesIO()
    with uncollected():
        _Writer(written, pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(_HEAD.pack(len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    (length,) = _HEAD.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    with uncollected():
        return _Reader(io.BytesIO(data)).load()


# ---- the caller's side ----------------------------------------------------------------------------------------------


class _Process:
    """The process that does the work; started when it is first needed, and again after it was stopped."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        here, words = "; ".join(f"sys.path[{i}:{i}]=[{p!r}]" for i, p in enumerate(sys.path)), "sys.path.clear()"
        code = f"import sys; {words}; {here}; from multiflora.stoppable import _serve; _serve({MEMORY!r})"
        self.process = subprocess.Popen(
            # isolated: neither the current folder nor the environment can put a module in the way
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _SHARED if name in os.environ},
        )
        self.last: Any = None
        global _told
        try:
            is_limited = _receive(self.process.stdout)  # type: ignore[arg-type]
        except EOFError:
            self.end()
            raise
        if not is_limited and not _told:
            _told = True
            log.warning(
                "This system does not limit the memory of a process: templates, regular expressions and looking for "
                "files are stopped by time alone. Use only recipes, tasks and adapters that you trust."
            )

    def ask(self, function: str, shared: Any, arguments: tuple[Any, ...]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        is_new = shared is not self.last
        data = _packed((function, SECONDS, is_new, shared if is_new else None, arguments))
        _send(self.process.stdin, data)  # type: ignore[arg-type]
        self.last = shared
        return _receive(self.process.stdout)  # type: ignore[arg-type]

    def end(self) -> int:
        """Close it and return its exit status."""
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                assert stream is not None
                stream.close()
        return self.process.wait()


_lock = threading.Lock()
_running: _Process | None = None
_told = False


def run(function: str, *arguments: Any, shared: Any = None) -> Any:
    """Call a function in the process that can be stopped.

    Args:
        function: Its module and name, ``multiflora.tasks.jinja:rendered``.
        arguments: Plain values.
        shared: First argument of the function where it is not None; not sent again while it is the same object.

    Raises:
        StoppedError: It took more than `SECONDS` or `MEMORY`, or gives more than `LONGEST` bytes.
        ValueError: It raised that.

    Example:
        >>> run("operator:add", 1, 2)
        3
    """
    global _running
    with _lock:
        if _running is None or _running.owner != os.getpid():  # a fork must not share its parent's pipe
            try:
                _running = _Process()
            except (EOFError, OSError) as error:
                raise EnvironmentProblem(
                    f"No process could be started for templates and patterns ({sys.executable}: {error or 'it ended'})."
                    " Is the disk or the memory full, or Python's folder not readable?"
                ) from error
        try:
            kind, value = _running.ask(function, shared, arguments)
        except (EOFError, BrokenPipeError) as error:
            status, _running = _running.end(), None
            raise StoppedError(_why(status)) from error
        except RecursionError as error:  # while it was packed: nothing has been sent
            raise ValueError("lists and objects stand too deep within one another") from error
        except BaseException:  # an answer may be half read: what comes next would be taken for another's
            _running.process.kill()
            _running.end()
            _running = None
            raise
        if kind == "memory":  # it has ended
            _running.end()
            _running = None
    if kind == "value":
        return value
    if kind == "memory":
        raise StoppedError(_why(None))
    if kind == "long":
        raise StoppedError(f"it would give more than {LONGEST:,} bytes")
    raise ValueError(value)


def _why(status: int | None) -> str:
    """Why the process ended: by a timer, its own watch (whose exit status is 1), for want of memory, or by a fault."""
    if status in (*(-number for number in _TIMERS), 1):
        return f"it takes more than {SECONDS:g} seconds"
    memory = f"it takes more than {MEMORY // 2**20:,} MiB of memory"
    is_fault = status is not None and status in (-signal.SIGSEGV, -signal.SIGABRT, -getattr(signal, "SIGBUS", 0))
    return f"{memory}, or a library fails ({signal.Signals(-status).name})" if status and is_fault else memory


@atexit.register
def _close() -> None:
    if _running is not None and _running.owner == os.getpid():
        _running.end()


# ---- the process's side ---------------------------------------------------------------------------------------------

_seconds = [0.0]


def restart_clock() -> None:
    """Give what follows its own time; for functions that do several pieces of work in one call."""
    seconds = _seconds[0]
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
    elif seconds:
        faulthandler.dump_traceback_later(WAITING * seconds, exit=True)  # a thread of C's, which waits for nobody
    else:
        faulthandler.cancel_dump_traceback_later()


def _limit(memory: int) -> bool:
    """Have the system limit the memory that this process takes from here on; False where it does not."""
    try:
        import resource

        most = _taken() + memory
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        return False
    return sys.platform != "darwin"  # which takes the limit and does not keep it


def _taken() -> int:
    """Bytes of address space that this process has; 0 where the system does not say."""
    with suppress(OSError), open("/proc/self/statm", "rb") as told:
        return int(told.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _serve(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, whose end closes the pipe
    for ends in _TIMERS:  # whose default is the end, in whatever call
        signal.signal(ends, signal.SIG_DFL)
    _send(sys.stdout.buffer, _packed(_limit(memory)))
    target, functions, held = sys.stdout.buffer, dict[str, Callable[..., Any]](), None
    while True:
        try:
            name, seconds, is_new, shared, arguments = _receive(sys.stdin.buffer)
            held = shared if is_new else held
            if name not in functions:
                module, _, inner = name.partition(":")
                functions[name] = getattr(importlib.import_module(module), inner)
                _limit(memory)
            _seconds[0] = seconds
            restart_clock()
            answer = _packed(_answer(functions[name], arguments if held is None else (held, *arguments)))
            _seconds[0] = 0
            restart_clock()
        except EOFError:
            return
        except (MemoryError, RecursionError):
            _send(target, _packed(("memory", None)))
            return  # what is left of it may be anything
        _send(target, answer if len(answer) <= LONGEST else _packed(("long", None)))


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", function(*arguments)
    except ValueError as error:
        return "error", str(error)
