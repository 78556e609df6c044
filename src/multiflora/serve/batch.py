"""The rows that are being written, and their keys and values: a row joins between two tokens and leaves the same way.

All rows share one cache, filled on the left up to the longest row, as `generate` fills a batch of prompts. A row that
joins brings the cache of its own prompt; a row that leaves takes its part along, and what no row needs any more is cut.
Short prompts that wait are read together, and a beginning that a running row has read, too, is copied from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from multiflora.serve.job import Job
from multiflora.serve.sampling import perturbed

__all__ = ["Batch", "Prefill", "joins", "next_token", "next_tokens"]

Forward = Callable[..., Any]
"""(ids, names, tasks, **words) -> a model's output."""
Begun = Sequence[tuple[Tensor, Tensor]]
"""Keys and values, (1, heads, tokens, width), of each layer."""

WORTH_COPYING = 32
"""Tokens of a beginning that is not read again: fewer are read faster together with other prompts."""


def joins(config: Any) -> bool:
    """Whether rows of a model can share a growing cache: not where a layer only keeps a window or a state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class Prefill:
    """Prompts on their way into a cache of their own: a long one chunk by chunk, or some short ones together.

    Args:
        jobs: The answers they are for.
        config: The model's.
        device: The model's.
        begun: Keys and values of the first tokens of a single prompt, layer by layer, where they are known.
    """

    def __init__(self, jobs: Sequence[Job], config: Any, device: torch.device, begun: Begun = ()) -> None:
        self.jobs = sorted(jobs, key=_side_by_side)
        self.cache = DynamicCache(config=config)
        for number, (keys, values) in enumerate(begun):
            self.cache.update(keys, values, number)
        self.done = self.cache.get_seq_length() if begun else 0
        self.lengths = [len(job.prompt) for job in self.jobs]
        self.longest = max(self.lengths)
        fill = [self.longest - length for length in self.lengths]
        rows = [[0] * empty + job.prompt for empty, job in zip(fill, self.jobs, strict=True)]
        self._ids = torch.tensor(rows, device=device)
        self._positions = torch.arange(self.longest, device=device) - torch.tensor(fill, device=device).unsqueeze(1)

    def step(self, forward: Forward, chunk: int) -> Tensor | None:
        """Read the next chunk; the logits of the first tokens once all is read, (rows, vocabulary)."""
        start, self.done = self.done, min(self.done + chunk, self.longest)
        out = forward(
            self._ids[:, start : self.done],
            [job.model for job in self.jobs],
            [job.task for job in self.jobs],
            attention_mask=(self._positions[:, : self.done] >= 0).long(),
            position_ids=self._positions[:, start : self.done].clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        found: Tensor = out.logits[:, -1]
        return found if self.done == self.longest else None


class Batch:
    """The running rows; rows of one model and task lie side by side."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._cache: Any = None
        self._lengths: list[int] = []
        self._tokens: list[int] = []

    def join(self, prefill: Prefill, logits: Tensor) -> None:
        """Take in rows whose prompts have been read; their first tokens are written at once."""
        tokens = next_tokens(prefill.jobs, logits)
        new = [k for k, job in enumerate(prefill.jobs) if job.finish is None]
        if not new:
            return
        if self.jobs:
            length = max(self._cache.get_seq_length(), prefill.done)
            for ours, theirs in zip(self._cache.layers, prefill.cache.layers, strict=True):
                ours.keys = torch.cat((_filled(ours.keys, length), _filled(theirs.keys[new], length)))
                ours.values = torch.cat((_filled(ours.values, length), _filled(theirs.values[new], length)))
        else:
            self._cache = prefill.cache
        before = len(self.jobs)
        self.jobs = [*self.jobs, *(prefill.jobs[k] for k in new)]
        self._lengths += [prefill.lengths[k] for k in new]
        self._tokens += [tokens[k] for k in new]
        if not before and len(new) < len(prefill.jobs):
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[new], layer.values[new]
        order = sorted(range(len(self.jobs)), key=lambda k: _side_by_side(self.jobs[k]))
        if order != list(range(len(order))):
            self._keep(order)

    def in_common(self, job: Job) -> tuple[int, int] | None:
        """The running row whose prompt begins as the job's does, and for how long; None where it is not worth it."""
        like = [k for k, other in enumerate(self.jobs) if (other.model, other.task) == (job.model, job.task)]
        common = {k: _common(self.jobs[k].prompt, job.prompt[:-1]) for k in like}
        row = max(common, key=common.__getitem__, default=None)
        if row is None or common[row] < WORTH_COPYING:
            return None
        return row, common[row]

    def begun(self, row: int, count: int) -> Begun:
        """Keys and values of a row's first tokens, copied."""
        start = self._cache.get_seq_length() - self._lengths[row]
        part = slice(start, start + count)
        return [
            (layer.keys[row : row + 1, :, part].clone(), layer.values[row : row + 1, :, part].clone())
            for layer in self._cache.layers
        ]

    def step(self, forward: Forward) -> None:
        """Write one token of every row, and let go of the rows that are finished."""
        self._drop()
        if not self.jobs:
            return
        device = self._cache.layers[0].keys.device
        lengths = torch.tensor(self._lengths, device=device).unsqueeze(1)
        past = self._cache.get_seq_length()
        out = forward(
            torch.tensor(self._tokens, device=device).unsqueeze(1),
            [job.model for job in self.jobs],
            [job.task for job in self.jobs],
            attention_mask=(torch.arange(past + 1, device=device) >= past - lengths).long(),
            position_ids=lengths,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._lengths = [length + 1 for length in self._lengths]
        self._tokens = next_tokens(self.jobs, out.logits[:, -1])
        self._drop()

    def _drop(self) -> None:
        for job in self.jobs:
            if job.cancelled:
                job.close("cancelled")
        left = [k for k, job in enumerate(self.jobs) if job.finish is None]
        if len(left) < len(self.jobs):
            self._keep(left)

    def _keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and no more of the cache than the longest needs."""
        self.jobs = [self.jobs[k] for k in rows]
        self._lengths = [self._lengths[k] for k in rows]
        self._tokens = [self._tokens[k] for k in rows]
        if not rows:
            self._cache = None
            return
        longest = max(self._lengths)
        for layer in self._cache.layers:
            layer.keys = layer.keys[list(rows)][:, :, -longest:]
            layer.values = layer.values[list(rows)][:, :, -longest:]


def _filled(states: Tensor, length: int) -> Tensor:
    """Keys or values, (rows, heads, length, width), filled on the left."""
    return F.pad(states, (0, 0, length - states.shape[2], 0))


def _side_by_side(job: Job) -> tuple[str, str]:
    """Rows that are equal in this are computed together."""
    return job.model, str(job.task)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts have in common from the beginning on."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def next_tokens(jobs: Sequence[Job], logits: Tensor) -> list[int]:
    """Draw each row's next token, (rows, vocabulary), and hand it to its job."""
    likeliest = logits.argmax(-1).tolist()  # of all rows at once: most are greedy
    return [
        next_token(job, own, token if job.temperature == 0 else None)
        for job, own, token in zip(jobs, logits, likeliest, strict=True)
    ]


def next_token(job: Job, logits: Tensor, token: int | None = None) -> int:
    """Draw a row's next token, where it is not known yet, and hand it to its job."""
    if token is None:
        token = int(perturbed(logits.float(), job).argmax())
    job.feed(token, logits)
    return token
