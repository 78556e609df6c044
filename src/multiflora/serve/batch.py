"""The rows that are being written, and their keys and values: a row joins between two tokens and leaves the same way.

All rows share one cache, filled on the left up to the longest row, as `generate` fills a batch of prompts. A row that
joins brings the cache of its own prompt; a row that leaves takes its part along, and what no row needs any more is cut.
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

__all__ = ["Batch", "Prefill", "joins", "next_token"]

Forward = Callable[..., Any]
"""(ids, names, tasks, **words) -> a model's output."""


def joins(config: Any) -> bool:
    """Whether rows of a model can share a growing cache: not where a layer only keeps a window or a state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class Prefill:
    """A prompt on its way into a cache of its own, chunk by chunk.

    Args:
        job: The answer it is for.
        config: The model's.
        device: The model's.
    """

    def __init__(self, job: Job, config: Any, device: torch.device) -> None:
        self.job = job
        self.cache = DynamicCache(config=config)
        self.done = 0
        self._ids = torch.tensor([job.prompt], device=device)

    def step(self, forward: Forward, chunk: int) -> Tensor | None:
        """Read the next chunk; the logits of the first token once all is read, (1, vocabulary)."""
        ids = self._ids[:, self.done : self.done + chunk]
        positions = torch.arange(self.done, self.done + ids.shape[1], device=ids.device).unsqueeze(0)
        out = forward(
            ids,
            [self.job.model],
            [self.job.task],
            attention_mask=torch.ones(1, self.done + ids.shape[1], dtype=torch.long, device=ids.device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.done += ids.shape[1]
        found: Tensor = out.logits[:, -1]
        return found if self.done == self._ids.shape[1] else None


class Batch:
    """The running rows; rows of one model and task lie side by side."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._cache: Any = None
        self._lengths: list[int] = []
        self._tokens: list[int] = []

    def join(self, prefill: Prefill, logits: Tensor) -> None:
        """Take in a row whose prompt has been read; its first token is written at once."""
        job = prefill.job
        token = next_token(job, logits[0])
        if job.finish is not None:
            return
        if not self.jobs:
            self._cache, self._lengths, self.jobs, self._tokens = prefill.cache, [prefill.done], [job], [token]
            return
        length = max(self._cache.get_seq_length(), prefill.done)
        for ours, new in zip(self._cache.layers, prefill.cache.layers, strict=True):
            ours.keys = torch.cat((_filled(ours.keys, length), _filled(new.keys, length)))
            ours.values = torch.cat((_filled(ours.values, length), _filled(new.values, length)))
        self.jobs.append(job)
        self._lengths.append(prefill.done)
        self._tokens.append(token)
        order = sorted(range(len(self.jobs)), key=lambda k: (self.jobs[k].model, str(self.jobs[k].task)))
        if order != list(range(len(order))):
            self._keep(order)

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
        self._tokens = [next_token(job, logits) for job, logits in zip(self.jobs, out.logits[:, -1], strict=True)]
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


def next_token(job: Job, logits: Tensor) -> int:
    """Draw a row's next token and hand it to its job."""
    token = int(perturbed(logits.float(), job).argmax())
    job.feed(token, logits)
    return token
