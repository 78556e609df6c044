"""Training: a recipe in, an adapter and a table of every task before and after out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiflora.train.run import RunResult, train

__all__ = ["RunResult", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded on first use: the number types in `precision` are wanted without the whole trainer
        from multiflora.train import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """Python binds ``multiflora.train`` to this package once it is imported; the public name must stay callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> RunResult:
        from multiflora.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
