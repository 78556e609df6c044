"""Which test runs which line of the files under test, and the copy of the source that tests import from."""

from __future__ import annotations

import compileall
import difflib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from mutants_made import Mutant

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
COPY = BUILD / "src" / "multiflora"
MAP = BUILD / "map.json"

SOURCES = ("methods/*.py", "training/*.py", "context.py", "forward_pass.py", "task_ids.py", "auxiliary_losses.py")
TESTS = (
    "tests/unit/test_context.py",
    "tests/unit/methods",
    "tests/unit/training",
    "tests/contract",
    "tests/property/test_rows.py",
    "tests/reference",
    "tests/unit/test_adapter_folder.py",
    "tests/unit/test_auxiliary_losses.py",
    "tests/unit/test_forward_pass.py",
    "tests/unit/test_task_ids.py",
    "tests/unit/ops/test_packed.py",
    "tests/unit/comparison/test_plan.py",
    "tests/integration/test_course.py",
    "tests/integration/test_train.py",
    "tests/integration/test_train_fit.py",
)
IMPORT = ""
"""In place of a test: a line runs while modules are imported."""
QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]


def sources(root: Path) -> list[str]:
    """The files under test, as paths inside the package."""
    return sorted(str(path.relative_to(root)) for pattern in SOURCES for path in root.glob(pattern))


def use_copy() -> None:
    """Tests, and the processes that they start, import the package from a fresh copy; threads and network stay off."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / "src" / "multiflora", COPY, ignore=shutil.ignore_patterns("__pycache__"))
    sys.path[:0] = [str(COPY.parent), str(ROOT)]
    more = {"PYTHONPATH": str(COPY.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.update(more | {"TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1"})
    compileall.compile_dir(COPY, quiet=1)
    os.chdir(ROOT)


class Recorded:
    """A pytest plugin: how long each test takes, which failed, and, with coverage, which test runs now."""

    def __init__(self, switch: Callable[[str], object] = lambda test: None) -> None:
        self.switch = switch
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.switch(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's set-up, call or end is done."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def make_map(tests: list[str], only: str) -> None:
    """Run tests file by file and record which of them run which line; by default files that are not known yet."""
    import coverage

    use_copy()
    known = json.loads(MAP.read_text()) if MAP.exists() else {"tests": {}, "files": {}}
    done = {test.partition("::")[0] for test in known["tests"]} if tests == list(TESTS) else set()
    for file in (str(file) for test in tests for file in (sorted(Path(test).rglob("test_*.py")) or [Path(test)])):
        if file in done:
            continue
        measured = coverage.Coverage(data_file=None, include=[str(COPY / name) for name in sources(COPY)])
        recorded = Recorded(measured.switch_context)
        measured.start()
        code = pytest.main([*QUIET, file, *(["-k", only] if only else [])], plugins=[recorded])
        measured.stop()
        add_to_map(known, file, recorded, measured.get_data())
        write(MAP, known)
        print(f"{file}: {sum(recorded.seconds.values()):.0f} s, {code!r}; failed: {recorded.failed}", flush=True)


def add_to_map(known: dict[str, Any], file: str, recorded: Recorded, data: Any) -> None:
    """One test file's tests in place of what was known of it."""
    passed = {test: seconds for test, seconds in recorded.seconds.items() if test not in recorded.failed}
    known["tests"] = {t: s for t, s in known["tests"].items() if not t.startswith(f"{file}::")} | passed
    for name in sources(COPY):
        text = (COPY / name).read_text("utf-8")
        lines = moved(known["files"].get(name, {"text": "", "lines": {}}), text)
        lines = {line: [test for test in tests if not test.startswith(f"{file}::")] for line, tests in lines.items()}
        for line, contexts in data.contexts_by_lineno(str(COPY / name)).items():
            lines[line] = lines.get(line, []) + [test for test in contexts if test in passed or test == IMPORT]
        known["files"][name] = {"text": text, "lines": lines}


def moved(file: dict[str, Any], text: str) -> dict[int, list[str]]:
    """A file's map after the file has changed: unchanged lines keep their tests."""
    before, now = file["text"].splitlines(), text.splitlines()
    blocks = difflib.SequenceMatcher(None, before, now, autojunk=False).get_matching_blocks()
    place = {block.a + i + 1: block.b + i + 1 for block in blocks for i in range(block.size)}
    return {place[int(line)]: list(dict.fromkeys(tests)) for line, tests in file["lines"].items() if int(line) in place}


class Lines:
    """The map as it is read: which test runs which line of the files as they are now."""

    def __init__(self, seconds: dict[str, float], lines: dict[str, dict[int, list[str]]]) -> None:
        self.seconds = seconds
        self.lines = lines

    @classmethod
    def read(cls) -> Lines:
        """For the copy's files."""
        known = json.loads(MAP.read_text())
        files = {name: known["files"].get(name, {"text": "", "lines": {}}) for name in sources(COPY)}
        return cls(
            known["tests"], {name: moved(file, (COPY / name).read_text("utf-8")) for name, file in files.items()}
        )

    def _of(self, mutant: Mutant, span: tuple[int, int]) -> set[str]:
        lines = self.lines[mutant.path]
        return {test for line in range(span[0], span[1] + 1) for test in lines.get(line, ())}

    def on_import(self, mutant: Mutant) -> bool:
        """Whether its lines run before any test does."""
        return IMPORT in self._of(mutant, mutant.lines)

    def covering(self, mutant: Mutant) -> set[str]:
        """The tests that run its lines; else its function's; the file's, for what runs on import."""
        for span in (mutant.lines, mutant.function):
            if span and (found := self._of(mutant, span) - {IMPORT}) and IMPORT not in self._of(mutant, span):
                return found
        if mutant.function and not self.on_import(mutant):
            return set()
        # a table of constants has no line that a test runs: the tests of its own file read it, or those of the cards
        path = Path(mutant.path)
        mirror = tuple(f"tests/unit/{path.with_name(f'test_{name}')}::" for name in (path.name, "cards.py"))
        found = {test for tests in self.lines[mutant.path].values() for test in tests} - {IMPORT}
        return found | {test for test in self.seconds if test.startswith(mirror)}


def affordable(tests: Iterable[str], seconds: dict[str, float], limit: float) -> list[str]:
    """Fastest first, until they take more seconds than the limit together."""
    spent, chosen = 0.0, []
    for test in sorted(tests, key=lambda test: (seconds[test], test)):
        spent += seconds[test]
        if chosen and spent > limit:
            break
        chosen.append(test)
    return chosen


def write(path: Path, value: object) -> None:
    """As JSON, whole or not at all."""
    path.with_suffix(".new").write_text(json.dumps(value, indent=1))
    path.with_suffix(".new").replace(path)
