"""Comparisons: several methods at one budget, several seeds, and what the numbers allow one to say."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiflora.compare.results import Summary
    from multiflora.compare.run import compare

__all__ = ["Summary", "compare"]

_HOME = {"compare": "run", "Summary": "results"}


def __getattr__(name: str) -> Any:
    if name in _HOME:  # loaded on first use: reading a comparison's YAML needs no torch
        from importlib import import_module

        return getattr(import_module(f"multiflora.compare.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """Python binds ``multiflora.compare`` to this package once it is imported; the public name must stay callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Summary:
        from multiflora.compare.run import compare

        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
