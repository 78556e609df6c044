"""The functions of :mod:`multiflora.ops` compiled for this machine: ``packed.cpp``, built once, then loaded.

Between two calls of torch Python takes microseconds, and after a large product, which empties the caches, several times
as many. A layer of a small model has some sixty such calls, and they came to two fifths of its extra time. Compiled,
the products follow one another at once, and what lies between them is a few loops. The arithmetic is the same in kind
and order, so results are equal to the last bit, and whether this module is at work can be seen in nothing but the time.

The first training or server on a processor builds the library with the system's C++ compiler, in about 20 seconds,
into the user's cache, its digest beside it; every later process loads it from there, once it has seen that folder and
files belong to the user or to root, that nobody else may write to them, and that the digest is the file's. Without a
compiler, on another system than Linux, or with ``MULTIFLORA_NATIVE=0`` in the environment, Python goes on making the
calls; so it does whatever goes wrong, and says once why.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from multiflora.files import cache_folder, write_text

__all__ = ["SOURCE", "library_file", "prepare", "serve", "state"]

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
    infer_experts: Any
    digest: Any


_functions: Functions | None = None
_failed = ""
"""Why loading or building did not work, once it was tried."""
_said = False
_tried: Literal["not yet", "to load", "to build"] = "not yet"


class RefusedError(Exception):
    """The library that is there is not to be loaded."""


# what compiler, disk and loader answer with, a home folder that cannot be told, and a library that lacks a function
_REFUSALS = (RefusedError, OSError, RuntimeError, AttributeError, ValueError, TypeError, subprocess.SubprocessError)


def serve(x: Tensor) -> Functions | None:
    """The compiled functions if ``x`` is for them: a plain tensor on a processor. None otherwise.

    The first call finds the library, and the first with gradients on builds it where there is none.
    """
    if not x.is_cpu or type(x) not in (Tensor, nn.Parameter) or torch._C._are_functorch_transforms_active():
        return None
    if _functions is None and _tried != "to build":
        _open(build=torch.is_grad_enabled())
    return _functions


def prepare() -> None:
    """Build the library where there is none: for a process that will use adapters for long, and trains none."""
    if _functions is None and _tried != "to build":
        _open(build=True)


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
    why = _why_not()
    if why is None and _failed:
        why = _failed
    if why is not None:
        return False, f"computed by Python: {why}"
    try:
        file = library_file()
        there = _is_built(file)
        if there:
            _check(file)
    except _REFUSALS as error:
        return False, f"computed by Python: {_reason(error)}"
    return True, f"compiled, {file}" if there else "compiled by the first training or server, in about 20 seconds"


def _why_not() -> str | None:
    """Why there is no library to be had here, whatever lies in the cache; None where there is."""
    if os.environ.get(_SWITCH) == "0":
        return f"{_SWITCH}=0 is set"
    if sys.platform != "linux":
        return "they are compiled on Linux only"
    if not compiler():
        return "no C++ compiler was found (c++, or what CXX names)"
    return None


def _open(*, build: bool) -> None:
    """Load the library; with ``build`` make it first where it is not there. Whatever fails, Python computes."""
    global _functions, _tried, _failed
    if _tried == "to load" and not build:
        return
    _tried = "to build" if build else "to load"
    why = _why_not()
    if why is not None:
        if build and os.environ.get(_SWITCH) != "0":  # else it was asked for
            _say(f"{why[0].upper()}{why[1:]}.")
        return
    try:
        file = library_file()
        if build and not _is_built(file):
            _build(file)
        if _is_built(file):
            _check(file)
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
            functions = Functions(*(getattr(torch.ops.multiflora, name).default for name in Functions._fields))
            _try_out(functions)
            _functions = functions
    except _REFUSALS as error:
        _failed = _reason(error)
        _say(_failed)


def _say(why: str) -> None:
    """Say why Python computes, once in a process: after a failed load, the attempt to build says nothing new."""
    global _said
    if not _said:
        _said = True
        log.warning(
            "The compiled branches are not in use, so Python computes them: the same numbers, in small layers more "
            "slowly. %s Set %s=0 in the environment to leave the attempt out.",
            why,
            _SWITCH,
        )


def _check(file: Path) -> None:
    """Refuse a library that somebody else may have put there, or that is not the one that was built.

    Raises:
        RefusedError: Owner, mode or content are not as `_build` left them.
        OSError: It cannot be read.
    """
    digest = _digest_of(file)
    _check_owner(*_folders(file), file, digest)
    if digest.read_text("ascii", errors="replace").strip() != hashlib.sha256(file.read_bytes()).hexdigest():
        raise RefusedError(f"{file} is not what was built (its digest is another than in {digest.name}). Remove it")


def _check_owner(*paths: Path) -> None:
    """Refuse files and folders that somebody else may write to."""
    for path in paths:
        about = path.lstat()
        if not (stat.S_ISDIR(about.st_mode) or stat.S_ISREG(about.st_mode)):
            raise RefusedError(f"{path} is a link or no plain file, so the library is not loaded. Remove it")
        if hasattr(os, "getuid") and about.st_uid not in (os.getuid(), 0):
            raise RefusedError(
                f"{path} belongs to another user ({about.st_uid}), so the library is not loaded. Remove it"
            )
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RefusedError(
                f"{path} may be written to by others (mode {stat.S_IMODE(about.st_mode):o}), so the library is not "
                f"loaded. Take that right away (chmod go-w {path}), and remove what others put there"
            )


def _folders(file: Path) -> tuple[Path, Path]:
    """The folders of ours above the library: who may write to one of them may replace it."""
    return file.parent.parent, file.parent


def _is_built(file: Path) -> bool:
    """Whether a library is there, and its digest; one without is built anew."""
    return file.exists() and _digest_of(file).exists()


def _digest_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _try_out(functions: Functions) -> None:
    """Ask the functions for a small sum: a library of other functions, or with other arguments, shows here.

    Raises:
        RefusedError: They give other numbers.
        RuntimeError: They take other arguments.
    """
    with torch.no_grad():
        A, B, base = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), torch.zeros(1, 2)
        found = functions.branches(base + 1, A, None, None, B, None, base, None, None, 1, 1, 2.0, 0.0, 0, 0.0, 0)
    if not torch.equal(found[0], torch.tensor([[18.0, 24.0]])):
        raise RefusedError("The library gives other numbers than Python, so it is not used. Remove it")


def _build(file: Path) -> None:
    """Compile the source into ``file``, whole or not at all; processes that come meanwhile wait for the first."""
    torch_folder = Path(torch.__file__).parent
    for place in _folders(file):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(place)
    with FileLock(f"{file}.lock"):
        if _is_built(file):
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
            # the digest first: a file without one is never loaded
            write_text(_digest_of(file), hashlib.sha256(made.read_bytes()).hexdigest() + "\n")
            for path in (made, _digest_of(file)):
                path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
            made.replace(file)


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _reason(error: Exception) -> str:
    """What went wrong, in a line: of a compiler's many lines the first that speaks of an error."""
    said = getattr(error, "stderr", None) or str(error)
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(error).__name__)
    return f"{first.rstrip('.')}."
