"""Evaluation: every task's score by lm-evaluation-harness, for a base model and for the adapted one."""

import sys
from types import ModuleType
from typing import Any

from multiflora.evaluate.results import Results, TaskScore
from multiflora.evaluate.run import evaluate

__all__ = ["Results", "TaskScore", "evaluate"]


class _Callable(ModuleType):
    """Python binds ``multiflora.evaluate`` to this package once it is imported; the public name must stay callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Results:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
