"""Write constraints.txt: the version of every package that the tests ran with.

Run by ``make constraints`` with the environment's Python. A package whose tested version needs a newer Python than the
oldest we support gets a marker, so that pip is free to choose an older version there.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

OURS = {"multiflora", "pip", "setuptools", "wheel"}
OLDEST = (10, 11, 12)  # minor versions of Python 3 tried for a marker, from the oldest supported

HEADER = f"""\
# Every version the tests ran with (Python {sys.version_info[0]}.{sys.version_info[1]}). Made by `make constraints`.
# A marker stands where the tested version does not exist for an older Python; pip then chooses one that does.
"""


def line(name: str, version: str, needs: str | None) -> str:
    """One constraint. A local part of the version (``+cpu``) names a build, not a version, and is left out."""
    pinned = f"{name}=={Version(version).public}"
    allowed = SpecifierSet(needs or "")
    first = next((minor for minor in OLDEST if allowed.contains(f"3.{minor}.99")), OLDEST[0])
    return pinned if first == OLDEST[0] else f'{pinned} ; python_version >= "3.{first}"'


def main() -> None:
    """Write the file beside this folder."""
    found = {
        dist.metadata["Name"]: line(dist.metadata["Name"], dist.version, dist.metadata["Requires-Python"])
        for dist in distributions()
        if dist.metadata["Name"].lower() not in OURS
    }
    lines = [found[name] for name in sorted(found, key=str.lower)]
    Path(__file__).parents[1].joinpath("constraints.txt").write_text(HEADER + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
