"""Evaluation: every task's score by lm-evaluation-harness, for a base model and for the adapted one."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiflora.evaluate.results import Results, TaskScore
    from multiflora.evaluate.run import evaluate

__all__ = ["Results", "TaskScore", "evaluate"]

_HOME = {"evaluate": "run", "Results": "results", "TaskScore": "results"}


def __getattr__(name: str) -> Any:
    if name in _HOME:  # loaded on first use: reading results needs no torch
        return getattr(import_module(f"multiflora.evaluate.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """Python binds ``multiflora.evaluate`` to this package once it is imported; the public name must stay callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Results:
        from multiflora.evaluate.run import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
