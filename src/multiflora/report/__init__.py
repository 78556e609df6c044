"""The report: what a run or a comparison found, as one page that needs nothing else."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiflora.report.run import Report, report

__all__ = ["Report", "report"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded on first use: the command line's --help needs no torch
        from multiflora.report import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """Python binds ``multiflora.report`` to this package once it is imported; the public name must stay callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        from multiflora.report.run import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
