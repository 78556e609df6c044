"""What the fuzz tests share: a world to run in, watched from outside, and a count of what was refused.

    MULTIFLORA_FUZZ_SEED=7 MULTIFLORA_FUZZ_TIMES=2 python -m pytest tests/fuzz -s

runs other examples than CI does, and twice as many, which is more than 10,000.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from multiflora import stoppable
from multiflora.errors import MultifloraError
from multiflora.methods import build_config

SEED = os.environ.get("MULTIFLORA_FUZZ_SEED")
TIMES = float(os.environ.get("MULTIFLORA_FUZZ_TIMES", "1"))
PATIENCE = float(os.environ.get("MULTIFLORA_FUZZ_PATIENCE", "10"))
"""Seconds after which an example counts as hanging, see `Clock`."""
WAITING = 30
"""Time on the clock, as a multiple of that, after which one counts as hanging whatever it works."""
SLOW = 5
"""Seconds above which an example is shown."""
MEMORY = 1_500_000_000
"""Bytes that this process and the one that it works in may hold together at any moment of one example."""
IMPORTED = 650_000_000
"""Of these, what torch and the libraries around it hold before anything is read."""


class HangError(BaseException):
    """Not an Exception: nothing on the way may take it for a fault of the input."""


class Clock:
    """Seconds that an example takes on a quiet machine: the processor time of this process and of those it works in.

    Others that use the machine, or stop this process for a while, do not count; waiting for nothing does, in the end.
    """

    def __init__(self) -> None:
        self.worker, self.before, self.start = _worker(), _used(), time.monotonic()
        self.others = _used_by(self.worker)

    def seconds(self) -> float:
        """What was used until now."""
        worker = _worker()
        of_worker = _used_by(worker) - (self.others if worker == self.worker else 0.0)
        ended = self.others if worker != self.worker else 0.0  # which is among the ended ones now, wholly
        return max(0.0, _used() - self.before + of_worker - ended)

    def check(self, *_: Any) -> None:
        """End an example that hangs."""
        seconds, waited = self.seconds(), time.monotonic() - self.start
        if seconds > PATIENCE or waited > WAITING * PATIENCE:
            raise HangError(f"nothing came back for {seconds:.0f} seconds of work, {waited:.0f} on the clock")


def _used() -> float:
    """Processor time of this process and of all that it started and that have ended."""
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def _used_by(process: int | None) -> float:
    """Processor time of a process that runs; 0 where the system does not say."""
    with suppress(OSError):
        told = Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


@contextmanager
def patience() -> Iterator[Clock]:
    """End an example that hangs, and tell what it took."""
    clock = Clock()
    before = signal.signal(signal.SIGALRM, clock.check)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield clock
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="session")
def imported() -> None:
    """Import what the first example would: it takes seconds, which are none of the example's."""
    build_config("rlora", {})


class World:
    """A folder to fuzz in, beside things that must stay as they are."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root, root / "work"
        self.work.mkdir()
        for name in ("home/.bashrc", "work/keep.jsonl", "outside/keep.txt"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("as it was\n", "utf-8")

    def picture(self, besides: set[str]) -> dict[str, Any]:
        """Every file and folder but those that the fuzz itself writes: name, size, time of the last change."""
        return {
            str(path.relative_to(self.root)): (path.lstat().st_size, path.lstat().st_mtime_ns) if path.is_file() else 0
            for path in sorted(self.root.rglob("*"))
            if path.relative_to(self.root).parts[:2] not in {("work", name) for name in besides}
        }


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    # matplotlib, which reasoning-gym imports, keeps a list of fonts
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("caches")))
    monkeypatch.chdir(made.work)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return made


class Memory:
    """The most memory that is held while an example is read, whatever those before it held.

    Linux counts anew when it is asked to; elsewhere it is the most that was ever held, which can only be more.
    """

    def __init__(self) -> None:
        self.worker = _worker()
        self.left_over = max(0, _held() - IMPORTED)
        for process in ("self", self.worker):
            with suppress(OSError):
                Path(f"/proc/{process}/clear_refs").write_text("5", "ascii")

    def peak(self) -> int:
        """Bytes, with those of the process that works for this one; where that was stopped, all that it may have.

        What tests of other folders have left in this process is none of the example's, so it is taken off.
        """
        is_stopped = self.worker not in (None, _worker())
        return _most("self") - self.left_over + (stoppable.MEMORY if is_stopped else _most(_worker()))


def _held() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    return 0


def _worker() -> int | None:
    """The process of `multiflora.stoppable`."""
    running = stoppable._running
    return None if running is None else running.process.pid


def _most(process: int | str | None) -> int:
    """The most bytes that a process has held since it was asked to count anew."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text("ascii", "replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    if process != "self":
        return 0 if process is None else stoppable.MEMORY
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


done: list[tuple[int, int, float, int]] = []
"""Of each test: inputs, those refused, the slowest in seconds, the most bytes."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell the figure of all tests of this folder together."""
    if done:
        inputs, refused, slowest, most = zip(*done, strict=True)
        terminalreporter.write_line(
            f"{sum(inputs):,} inputs, {sum(refused):,} refused; the slowest took {max(slowest):.1f} s, the one that "
            f"held most memory had {max(most) / 10**6:,.0f} MB"
        )


def fuzz(
    world: World,
    strategy: Any,
    wanted: int,
    write: Callable[[Any], None],
    read: Callable[[], Any],
    tries: float = 1.25,
) -> None:
    """Write example after example and read each; all must be refused in words, or be good.

    Args:
        world: Where it happens.
        strategy: Makes an example.
        wanted: How many must be refused.
        write: Writes an example to the world's ``work/fuzzed*``.
        read: Reads it, as a command would.
        tries: Examples made for each that must be refused: some turn out to be good.
    """
    ended: Counter[str] = Counter()
    slowest, most = 0.0, 0
    written = {"fuzzed", *(f"fuzzed{suffix}" for suffix in (".yaml", ".jsonl", ".json", ".csv", ".tsv", ".parquet"))}
    before = world.picture(written)

    @settings(
        max_examples=round(TIMES * wanted * tries),
        derandomize=SEED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(example: Any) -> None:
        nonlocal slowest, most
        write(example)
        memory = Memory()
        with patience() as clock:
            try:
                read()
            except MultifloraError as error:
                said = error
            except HangError:
                print(f"ended: {str(example)[:300]!r} ({len(str(example))} characters)")
                raise
            else:
                said = None
        seconds = clock.seconds()
        if seconds > max(slowest, SLOW):
            print(f"{seconds:.1f} s, {said and str(said)[:200]!r}: {str(example)[:300]!r}")
        slowest, held = max(slowest, seconds), memory.peak()
        most = max(most, held)
        assert held < MEMORY, f"{held / 10**6:,.0f} MB"
        ended["no fault after all" if said is None else type(said).__name__] += 1
        assert said is None or len(str(said)) > 20, repr(said)

    (each if SEED is None else seeded(int(SEED))(each))()
    refused = sum(ended.values()) - ended["no fault after all"]
    told = f"slowest {slowest:.1f} s, most {most / 10**6:,.0f} MB"
    print(f"{sum(ended.values())} inputs, {refused} refused: {dict(ended)}; {told}")
    done.append((sum(ended.values()), refused, slowest, most))
    assert refused >= TIMES * wanted * (1 if SEED is None and TIMES >= 1 else 0.8)
    assert world.picture(written) == before
