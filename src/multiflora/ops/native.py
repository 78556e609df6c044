"""The functions of :mod:`multiflora.ops` compiled for this machine: ``packed.cpp``, built once, then loaded.

Between two calls of torch Python takes microseconds, and after a large product, which empties the caches, several times
as many. A layer of a small model has some sixty such calls, and they came to two fifths of its extra time. Compiled,
the products follow one another at once, and what lies between them is a few loops. The arithmetic is the same in kind
and order, so results are equal to the last bit, and whether this module is at work can be seen in nothing but the time.

The first training on a processor builds the library with the system's C++ compiler, in about 20 seconds, into the
user's cache; every later process loads it from there. Without a compiler, on another system than Linux, or with
``MULTIFLORA_NATIVE=0`` in the environment, Python goes on making the calls.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from multiflora.files import cache_folder

__all__ = ["SOURCE", "library_file", "serve", "state"]

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("packed.cpp")
_SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
_SWITCH = "MULTIFLORA_NATIVE"
# -ffp-contract=off: a product and a sum are rounded one after the other, as torch's calls round them
_FLAGS = ("-O3", "-ffp-contract=off", "-fopenmp", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden")
_VECTORS = {
    "AVX2": ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        "-DCPU_CAPABILITY=AVX512",
        "-DCPU_CAPABILITY_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    ),
}
"""By what torch itself finds on this processor."""


class Functions(NamedTuple):
    """What the library holds; the arguments are those of the functions of their names, in one flat list."""

    stems: Any
    heads: Any
    branches: Any
    infer: Any
    digest: Any


_functions: Functions | None = None
_tried: Literal["not yet", "to load", "to build"] = "not yet"

# what compiler, disk and loader answer with, and a home folder that cannot be told
_REFUSALS = (OSError, RuntimeError, subprocess.SubprocessError)


def serve(x: Tensor) -> Functions | None:
    """The compiled functions if ``x`` is for them: a plain tensor on a processor. None otherwise.

    The first call finds the library, and the first with gradients on builds it where there is none.
    """
    if not x.is_cpu or type(x) not in (Tensor, nn.Parameter) or torch._C._are_functorch_transforms_active():
        return None
    if _functions is None and _tried != "to build":
        _open(build=torch.is_grad_enabled())
    return _functions


def library_file() -> Path:
    """Where the library of this source, this torch and this compiler lies, built or not."""
    what = (
        *(source.read_bytes() for source in _SOURCES),
        torch.__version__,
        platform.machine(),
        *compiler(),
        *_flags(),
    )
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    return cache_folder("native") / f"packed-{digest}.so"


def compiler() -> list[str]:
    """The command of the C++ compiler, ``$CXX`` or c++; empty where the library is not to be built."""
    if sys.platform != "linux" or os.environ.get(_SWITCH) == "0":
        return []
    try:
        program, *words = shlex.split(os.environ.get("CXX") or "c++")
    except ValueError:  # an open quote
        return []
    found = shutil.which(program)
    return [found, *words] if found else []


def state() -> tuple[bool, str]:
    """Whether the compiled functions are used here, and a sentence about it."""
    if os.environ.get(_SWITCH) == "0":
        return False, f"computed by Python: {_SWITCH}=0 is set"
    if sys.platform != "linux":
        return False, "computed by Python: they are compiled on Linux only"
    if not compiler():
        return False, "computed by Python: no C++ compiler was found (c++, or what CXX names)"
    try:
        there = library_file().exists()
    except _REFUSALS as error:
        return False, f"computed by Python: {_reason(error)}"
    return True, f"compiled, {library_file()}" if there else "compiled by the first training, in about 20 seconds"


def _open(*, build: bool) -> None:
    """Load the library; with ``build`` make it first where it is not there."""
    global _functions, _tried
    if _tried == "to load" and not build:
        return
    _tried = "to build" if build else "to load"
    if not compiler():
        return
    try:
        file = library_file()
        if build and not file.exists():
            _build(file)
        if file.exists():
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
            _functions = Functions(*(getattr(torch.ops.multiflora, name).default for name in Functions._fields))
    except _REFUSALS as error:
        log.warning(
            "The branches could not be compiled for this processor, so Python computes them: the same numbers, in "
            "small layers more slowly. %s Set %s=0 in the environment to leave the attempt out.",
            _reason(error),
            _SWITCH,
        )


def _build(file: Path) -> None:
    """Compile the source into ``file``, whole or not at all; processes that come meanwhile wait for the first."""
    torch_folder = Path(torch.__file__).parent
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.exists():
            return
        log.info("Compiling the branches for this processor: about 20 seconds, once.")
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            headers = (torch_folder / "include", torch_folder / "include/torch/csrc/api/include")
            command: list[str | Path] = [
                *compiler(),
                *_flags(),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                *(part for header in headers for part in ("-isystem", header)),
                SOURCE,
                f"-L{torch_folder / 'lib'}",
                "-ltorch_cpu",
                "-lc10",
                "-o",
                made,
            ]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=600)
            made.replace(file)


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _reason(error: Exception) -> str:
    """What went wrong, in a line: of a compiler's many lines the first that speaks of an error."""
    said = getattr(error, "stderr", None) or str(error)
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(error).__name__)
    return f"{first.rstrip('.')}."
