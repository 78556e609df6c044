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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from multiflora.errors import MultifloraError

SEED = os.environ.get("MULTIFLORA_FUZZ_SEED")
TIMES = float(os.environ.get("MULTIFLORA_FUZZ_TIMES", "1"))
PATIENCE = float(os.environ.get("MULTIFLORA_FUZZ_PATIENCE", "10"))
"""Seconds on the clock of a quiet machine after which an example counts as hanging."""
SLOW = 5
"""Seconds above which an example is shown."""
MEMORY = 1_500_000_000
"""Bytes that the process, and one that it starts, may hold."""


class HangError(BaseException):
    """Not an Exception: nothing on the way may take it for a fault of the input."""


def busy() -> float:
    """How many times longer all takes as others use the machine, too: processes that wait for each processor."""
    return max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


@contextmanager
def patience() -> Iterator[None]:
    """End an example that hangs."""
    seconds = PATIENCE * busy()

    def stop(*_: Any) -> None:
        raise HangError(f"nothing came back for {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def memory() -> tuple[int, int]:
    """The most bytes that this process, and one that it started, have ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return tuple(resource.getrusage(who).ru_maxrss * unit for who in both)  # type: ignore[return-value]


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
    slowest, started = 0.0, memory()
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
        nonlocal slowest
        write(example)
        start = time.perf_counter()
        with patience():
            try:
                read()
            except MultifloraError as error:
                said = error
            else:
                said = None
        seconds = time.perf_counter() - start
        if seconds > max(slowest, SLOW):
            print(f"{seconds:.1f} s, {said and str(said)[:200]!r}: {str(example)[:300]!r}")
        slowest = max(slowest, seconds)
        ended["no fault after all" if said is None else type(said).__name__] += 1
        assert said is None or len(str(said)) > 20, repr(said)

    (each if SEED is None else seeded(int(SEED))(each))()
    refused = sum(ended.values()) - ended["no fault after all"]
    held = [round(bytes_ / 10**6) for bytes_ in memory()]
    print(f"{sum(ended.values())} inputs, {refused} refused: {dict(ended)}; slowest {slowest:.1f} s; {held} MB")
    assert refused >= TIMES * wanted * (1 if SEED is None and TIMES >= 1 else 0.8)
    # the tests before may have held more: then it must not become much more
    assert all(now < max(MEMORY, start + MEMORY // 3) for now, start in zip(memory(), started, strict=True))
    assert world.picture(written) == before
