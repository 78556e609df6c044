"""Do the tests see it? A seeded sample of small faults in the source, and for each whether a test fails.

    pip install coverage                                        # once, for the map alone
    python tools/mutants.py map                                 # which test runs which line: minutes
    python tools/mutants.py map tests/unit/test_context.py      # the same for new tests, added to the map
    python tools/mutants.py run --seed 1 --number 200           # mutants, one after the other; survivors are printed
    python tools/mutants.py run --seed 1 --number 200 --again   # the survivors once more, after new tests

A mutant is one changed expression or one removed statement (``mutants_made.py``) in a copy of the source, which tests
import from (``mutants_map.py``). Each is tried by the tests that cover its lines, fastest first, until one fails
(``mutants_run.py``). Stop it as you like: what is known is in the results file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import time
from collections import Counter
from typing import Any

import pytest
from mutants_made import Mutant, mutants_of
from mutants_map import BUILD, COPY, QUIET, TESTS, Lines, affordable, make_map, sources, use_copy, write
from mutants_run import Living, fate_on_import

LOADED = "torch transformers datasets accelerate peft trl lm_eval hypothesis safetensors.torch"


def sample(seed: int, number: int, only: str) -> list[Mutant]:
    """Mutants of all files under test, drawn without replacement; a larger sample begins with a smaller one."""
    drawn = [mutant for name in sources(COPY) for mutant in mutants_of(name, (COPY / name).read_text("utf-8"))]
    # by a digest each, so that a change of the source leaves the rest of the sample as it was
    drawn.sort(key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())
    return [mutant for mutant in drawn if only in mutant.path][:number]


class Trial:
    """A sample and what is known of it, in a file that every fork of this process reads anew."""

    def __init__(self, seed: int, seconds: float, until: float, again: bool) -> None:
        self.results = BUILD / f"seed{seed}.json"
        self.seconds, self.end, self.again = seconds, time.monotonic() + 60 * until, again
        self.known = Lines.read()
        self.before = self.found()

    def found(self) -> dict[str, Any]:
        """The results."""
        return json.loads(self.results.read_text()) if self.results.exists() else {}

    def wants(self, mutant: Mutant) -> bool:
        """Whether it is still to be tried."""
        old, now = self.before.get(mutant.key), self.found().get(mutant.key)
        if time.monotonic() > self.end:
            return False
        return now is None or (self.again and now == old and old["fate"] in ("survived", "uncovered"))

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that cover it."""
        return affordable(self.known.covering(mutant), self.known.seconds, self.seconds)

    def limit(self, tests: list[str]) -> float:
        """Seconds after which it hangs."""
        return 300 + 20 * sum(self.known.seconds[test] for test in tests)

    def note(self, mutant: Mutant, fate: str, by: str, tests: list[str], begun: float) -> None:
        """Keep and print what became of it."""
        took = round(time.monotonic() - begun, 1)
        one = {"fate": fate, "by": by, "tests": len(tests), "seconds": took, "shown": str(mutant)}
        write(self.results, self.found() | {mutant.key: one})
        print(f"{fate:9} {took:5.1f} s {len(tests):4} tests  {mutant}", flush=True)


def run(seed: int, number: int, seconds: float, until: float, only: str, again: bool) -> None:
    """Try a sample of mutants and print those that no test has seen."""
    use_copy()
    for name in LOADED.split():
        importlib.import_module(name)
    trial = Trial(seed, seconds, until, again)
    drawn = sample(seed, number, only)
    living = [mutant for mutant in drawn if mutant.function and not trial.known.on_import(mutant)]
    child = os.fork()
    if child == 0:
        try_living(trial, living)
        os._exit(0)
    os.waitpid(child, 0)
    for mutant in drawn:
        if not trial.wants(mutant):
            continue
        begun, tests = time.monotonic(), trial.tests(mutant)
        text = mutant.text((COPY / mutant.path).read_text("utf-8"))
        fate = fate_on_import(mutant, text, tests, trial.limit(tests)) if tests else ("uncovered", "")
        trial.note(mutant, *fate, tests, begun)
    found = trial.found()
    report({mutant.key: found[mutant.key] for mutant in drawn if mutant.key in found})


def try_living(trial: Trial, mutants: list[Mutant]) -> None:
    """Those in functions that need no import anew."""

    def each(session: Living) -> None:
        for mutant in mutants:
            tests = trial.tests(mutant)
            if not tests or not trial.wants(mutant):
                continue
            begun = time.monotonic()
            text = mutant.text((COPY / mutant.path).read_text("utf-8"))
            fate, by = session.fate(mutant, text, tests, trial.limit(tests))
            # a survivor may be what ran before: it is tried once more from the import
            if fate in ("killed", "timeout"):
                trial.note(mutant, fate, by, tests, begun)

    files = sorted({test.partition("::")[0] for mutant in mutants for test in trial.tests(mutant)})
    if any(trial.wants(mutant) for mutant in mutants):
        pytest.main([*QUIET, "-s", *files], plugins=[Living(each)])


def report(found: dict[str, Any]) -> None:
    """The share, and every survivor."""
    fates = Counter(one["fate"] for one in found.values())
    killed = fates["killed"] + fates["timeout"]
    print(f"\n{killed} of {len(found)} killed ({killed / max(len(found), 1):.1%}): {dict(fates)}")
    for one in sorted(found.values(), key=lambda one: str(one["shown"])):
        if one["fate"] in ("survived", "uncovered"):
            print(f"{one['fate']:9} {one['tests']:4} tests  {one['shown']}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maps = commands.add_parser("map")
    maps.add_argument("tests", nargs="*", default=list(TESTS))
    maps.add_argument("-k", dest="only", default="", help="pytest's, for a quicker map of less")
    runs = commands.add_parser("run")
    runs.add_argument("--seed", type=int, default=1)
    runs.add_argument("--number", type=int, default=100)
    runs.add_argument("--seconds", type=float, default=60, help="of tests a mutant at most")
    runs.add_argument("--until", type=float, default=60, help="minutes after which no new mutant is begun")
    runs.add_argument("--only", default="", help="part of a path")
    runs.add_argument("--again", action="store_true", help="try survivors once more")
    words = vars(parser.parse_args())
    BUILD.mkdir(parents=True, exist_ok=True)
    {"map": make_map, "run": run}[words.pop("command")](**words)


if __name__ == "__main__":
    main()
