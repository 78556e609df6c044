"""One answer to be written: what is asked, and the channel its pieces go through."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from multiflora.serve.metrics import Metrics
from multiflora.serve.text import Decoder

__all__ = ["Finish", "Job", "Piece", "Told"]

Finish = Literal["stop", "length", "cancelled", "failed"]


class Told(NamedTuple):
    """A token with its logarithmic probability under the model (before temperature), and the likeliest in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Piece(NamedTuple):
    """Some text, or the end."""

    text: str
    finish: Finish | None = None
    told: tuple[Told, ...] = ()
    """The tokens since the piece before, where they were asked for."""


class Job:
    """An answer; fed by the engine's thread, read by a request.

    Args:
        model: Name of the served model.
        prompt: Its tokens.
        max_tokens: Longest answer.
        temperature: 0 for the likeliest token each time.
        top_p: Share of probability that is sampled from.
        seed: Of the sampling; None draws one.
        stops: Texts that end the answer.
        task: The task to run under.
        tokenizer: Turns ids into text.
        ends: Ids that end an answer.
        loop: The event loop its reader runs in.
        alternatives: How many of the likeliest tokens are told with each token; None: no probabilities at all.
    """

    def __init__(
        self,
        *,
        model: str,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stops: Sequence[str],
        task: str | int | None,
        tokenizer: Any,
        ends: Sequence[int],
        loop: asyncio.AbstractEventLoop,
        alternatives: int | None = None,
    ) -> None:
        self.model = model
        self.prompt = list(prompt)
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self.task = task
        self.finish: Finish | None = None
        self.cancelled = False
        self.decoder = Decoder(tokenizer, stops)
        self.alternatives = alternatives
        self._told: list[Told] = []
        self.watcher: Metrics | None = None
        self.started = time.perf_counter()
        self.ends = frozenset(ends)
        self._loop = loop
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()

    @property
    def tokens(self) -> int:
        """How many tokens the answer has so far."""
        return len(self.decoder.ids)

    @property
    def room(self) -> int:
        """How many tokens it may come to, prompt and answer."""
        return len(self.prompt) + self.max_tokens

    def feed(self, token: int, logits: torch.Tensor) -> None:
        """Take the next token, and the logits it was drawn from; called by the engine's thread until a finish."""
        if self.cancelled:
            self.close("cancelled")
            return
        if self.watcher is not None:
            if not self.tokens:
                self.watcher.first(time.perf_counter() - self.started, len(self.prompt))
            self.watcher.token()
        if self.alternatives is not None:
            self._told.append(self._probability(token, logits, self.alternatives))
        text = self.decoder.add(token)
        if token in self.ends or self.decoder.stopped:
            self.close("stop", text)
        elif self.tokens >= self.max_tokens:
            self.close("length", text)
        elif text:
            self._send(Piece(text, None, self._new()))

    def close(self, finish: Finish, text: str = "") -> None:
        """End the answer, once."""
        if self.finish is None:
            self.finish = finish
            if self.watcher is not None:
                self.watcher.finished(finish)
            self._send(Piece(text + self.decoder.end(), finish, self._new()))

    def _new(self) -> tuple[Told, ...]:
        told, self._told = tuple(self._told), []
        return told

    def _probability(self, token: int, logits: torch.Tensor, count: int) -> Told:
        found = logits.float().log_softmax(-1)
        values, ids = found.topk(count)
        decode = self.decoder.tokenizer.decode
        top = tuple((decode([i]), value) for i, value in zip(ids.tolist(), values.tolist(), strict=True))
        return Told(decode([token]), float(found[token]), top)

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more."""
        self.cancelled = True

    def _send(self, piece: Piece) -> None:
        # a server that is being stopped may have closed its loop before the thread hears of it
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it is written, up to the piece that carries the finish."""
        while True:
            piece = await self._pieces.get()
            yield piece
            if piece.finish is not None:
                return

    async def whole(self) -> Piece:
        """The whole answer at once."""
        found = [piece async for piece in self.pieces()]
        told = tuple(token for piece in found for token in piece.told)
        return Piece("".join(piece.text for piece in found), found[-1].finish, told)
