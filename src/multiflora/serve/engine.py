"""Writes the answers: jobs wait in a queue, those of one model go together as a batch, one thread computes.

One thread, because a model's modules keep the batch's tasks between layers. Rows of a batch do not see each other, and
each has its own task, sampling, stops and length; a row whose client has gone is finished at the next token.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from multiflora.context import task as under_task
from multiflora.serve.job import Job
from multiflora.serve.limits import Limits
from multiflora.serve.models import Served
from multiflora.serve.sampling import RowSampler

__all__ = ["Engine", "QueueFullError"]

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """No more jobs are taken for now."""


class Engine:
    """The queue and its one thread.

    Args:
        models: What is served, by name.
        pad: Id to pad prompts with.
        ends: Ids that end an answer.
        limits: The server's bounds.
    """

    def __init__(self, models: Mapping[str, Served], pad: int, ends: Sequence[int], limits: Limits) -> None:
        self.models = models
        self.limits = limits
        self._pad = pad
        self._ends = list(ends)
        self._waiting: deque[Job] = deque()
        self._running: Sequence[Job] = ()
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="multiflora-generate")
        self._stopping = False

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all the jobs of a request, or none of them.

        Raises:
            QueueFullError: Too many wait already, or the server is being stopped.
        """
        if self._stopping or len(self._waiting) + len(jobs) > self.limits.max_queue:
            raise QueueFullError
        self._waiting.extend(jobs)
        self._arrived.set()

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._running = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            done = loop.run_in_executor(self._pool, self._generate, batch)
            await asyncio.wait([done])
            if (error := done.exception()) is not None:
                # whatever went wrong, e.g. no memory for this batch, concerns these answers; the next may be shorter
                log.error("A batch of %d answers failed: %s", len(batch), error, exc_info=error)
            for job in batch:
                job.close("failed")

    def _next_batch(self) -> list[Job]:
        """The longest-waiting job, and those that can go with it."""
        batch: list[Job] = []
        left: deque[Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            if job.cancelled:
                job.close("cancelled")
            elif len(batch) < self.limits.max_batch and (not batch or job.model == batch[0].model):
                batch.append(job)
            else:
                left.append(job)
        self._waiting = left
        return batch

    async def stop(self) -> None:
        """Take no more jobs, end those there are, and let the thread finish."""
        self._stopping = True
        for job in (*self._waiting, *self._running):
            job.cancel()
        while self._waiting:
            self._waiting.popleft().close("cancelled")
        await asyncio.to_thread(self._pool.shutdown, wait=True)

    def _generate(self, batch: Sequence[Job]) -> None:
        """Write the answers of a batch; runs in the thread."""
        served = self.models[batch[0].model]
        device = next(served.model.parameters()).device
        length = max(len(job.prompt) for job in batch)
        ids = [[self._pad] * (length - len(job.prompt)) + job.prompt for job in batch]
        mask = [[0] * (length - len(job.prompt)) + [1] * len(job.prompt) for job in batch]
        tasks = [job.task for job in batch]
        # a model that only may know its task runs without, unless every row says it
        known = under_task(served.model, [t for t in tasks if t is not None]) if None not in tasks else nullcontext()
        with torch.inference_mode(), known:
            served.model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(job.max_tokens for job in batch),
                    do_sample=False,
                    pad_token_id=self._pad,
                    eos_token_id=self._ends or None,
                ),
                logits_processor=LogitsProcessorList([RowSampler(batch)]),
                stopping_criteria=StoppingCriteriaList([_Finished(batch)]),
                streamer=_Feed(batch),
            )


class _Feed(BaseStreamer):
    """Hands each row's token to its job."""

    def __init__(self, batch: Sequence[Job]) -> None:
        self.batch = batch
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompts, once, then one token for each row."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for job, token in zip(self.batch, value.tolist(), strict=True):
            if job.finish is None:
                job.feed(int(token))

    def end(self) -> None:
        """Nothing is left to do: each job has had its finish."""


class _Finished(StoppingCriteria):
    """Says which rows are finished."""

    def __init__(self, batch: Sequence[Job]) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([job.finish is not None for job in self.batch], device=input_ids.device)
