"""The libraries' own bars and notices, kept off the screen while a run shows its one bar."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_log

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence bars of datasets and transformers, and transformers' notices on its own future, for a while.

    Their errors stay, and so does every other warning.
    """
    bars = datasets.are_progress_bars_disabled(), transformers_log.is_progress_bar_enabled()
    level = transformers_log.get_verbosity()
    datasets.disable_progress_bars()
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
            yield
    finally:
        transformers_log.set_verbosity(level)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers_log.enable_progress_bar()
