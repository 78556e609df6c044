"""Libraries are quiet for a while, and as they were afterwards."""

from __future__ import annotations

import warnings

import datasets
import pytest
from transformers.utils import logging as transformers_log

from multiflora.training.quiet import quiet_libraries


def state() -> tuple[bool, bool, int]:
    return (
        datasets.are_progress_bars_disabled(),
        transformers_log.is_progress_bar_enabled(),
        transformers_log.get_verbosity(),
    )


def test_bars_are_off_inside_and_back_outside() -> None:
    before = state()
    with quiet_libraries():
        assert state() == (True, False, transformers_log.ERROR)
    assert state() == before


def test_other_warnings_still_come_through() -> None:
    with pytest.warns(UserWarning, match="look here"), quiet_libraries():
        warnings.warn("look here", UserWarning, stacklevel=1)
