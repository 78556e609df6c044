"""How much one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every bound of the server, in one place."""

    max_tokens: int = 1024
    """Longest answer, in tokens; what a request gets that does not say."""
    max_batch: int = 16
    """Most answers written at once."""
    max_cache: int = 1 << 16
    """Most tokens of all answers that are being written, their prompts and longest lengths together; a request that
    alone could come to more is refused."""
    chunk: int = 128
    """Most tokens of a prompt that are read between two tokens of the running answers."""
    max_queue: int = 256
    """Most answers waiting; a request beyond that gets status 429."""
    max_body: int = 1 << 20
    """Largest request, in bytes."""
    body_seconds: float = 30.0
    """How long a request may take to arrive, in seconds."""
    max_prompts: int = 64
    """Most prompts of one completion request."""
