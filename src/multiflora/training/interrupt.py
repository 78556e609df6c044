"""SIGTERM, as preemptible machines and job schedulers send it: noted, and acted on at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["StopAsked", "stop_on_sigterm"]


class StopAsked:
    """Whether somebody asked the process to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        """Note a signal."""
        self.asked = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopAsked]:
    """Within, SIGTERM no longer ends the process; what it does is up to whoever reads ``asked``.

    Outside the main thread Python cannot handle signals, and nothing changes.
    """
    stop = StopAsked()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
