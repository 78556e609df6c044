"""Run peft's own tests, unchanged, on multiflora's methods.

The tests come with the source distribution of the installed peft, fetched through pip into ``.peft-suite/`` (ignored
by git) and unpacked as the namespace package ``peft_tests``. ``tests/peft_suite/`` puts our methods into their tables.
The tiny models they ask the hub for are made here, at random, in the layout of the hub's cache: no network is needed.

    python tools/peft_suite.py [pytest's arguments]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".peft-suite"


def tests_of(release: str) -> Path:
    """The folder that holds ``peft_tests``, the test files of a peft release; fetched on first use."""
    folder = HOME / f"peft-{release}"
    if not (folder / "peft_tests").is_dir():
        HOME.mkdir(exist_ok=True)
        # pip, not a download of our own: it knows the registry this machine uses, and checks the file's hash
        fetch = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
        subprocess.run([sys.executable, "-m", *fetch, "--dest", str(HOME), f"peft=={release}"], check=True)
        with tarfile.open(HOME / f"peft-{release}.tar.gz") as archive:
            archive.extractall(HOME, filter="data")
        (folder / "tests").rename(folder / "peft_tests")
    return folder


def main(arguments: list[str]) -> NoReturn:
    """Fetch, make the models, run pytest on the shim with the given arguments."""
    suite = tests_of(version("peft"))
    hub = HOME / f"hub-transformers-{version('transformers')}"
    environment = os.environ | {
        "MULTIFLORA_PEFT_SUITE": str(suite),
        "HF_HOME": str(hub),
        "HF_HUB_CACHE": str(hub / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # without it peft's torch.compile tests skip themselves
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
    }
    if not (hub / "made").exists():
        subprocess.run([sys.executable, str(ROOT / "tools" / "tiny_hub.py"), str(hub)], check=True, env=environment)
    named = any(argument.partition("::")[0].endswith(".py") for argument in arguments)
    files = arguments if named else [str(ROOT / "tests" / "peft_suite"), *arguments]
    # in place of this process, so that whoever stops this one stops the tests
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *files], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
