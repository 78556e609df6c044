"""SIGTERM is noted within, and is the process's own again afterwards."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from multiflora.training.interrupt import StopAsked, stop_on_sigterm


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to itself ends the process there")
def test_a_signal_is_noted_and_no_more_than_that() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stop_on_sigterm() as stop:
            seen.append((stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    [(stop, handler)] = seen
    assert isinstance(stop, StopAsked)
    assert not stop.asked
    assert handler == before
