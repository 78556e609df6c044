"""A smaller model instead of an adapter: low-rank plus structured-sparse compression (LoSparse)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiflora.compress.run import Compressed, compress
    from multiflora.compress.saved import load_compressed

_LAZY = {
    "Compressed": "multiflora.compress.run",
    "compress": "multiflora.compress.run",
    "load_compressed": "multiflora.compress.saved",
}

__all__ = ["Compressed", "compress", "load_compressed"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'multiflora.compress' has no attribute {name!r}; it has {', '.join(__all__)}.")
