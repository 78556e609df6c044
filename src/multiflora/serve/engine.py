"""Writes the answers: a request joins the running ones at the next token and leaves when it is finished.

One thread computes. Between two tokens of the running rows it reads at most one chunk of a new prompt, so a long prompt
holds nobody up for longer than that. Rows of the base model and of all adapters that change linear layers alone run
together (`multiflora.serve.mixed`); any other model has rows of its own.
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
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from multiflora.context import task as under_task
from multiflora.serve.batch import Batch, Forward, Prefill, joins, next_token
from multiflora.serve.job import Job
from multiflora.serve.limits import Limits
from multiflora.serve.metrics import Metrics
from multiflora.serve.mixed import Mixed
from multiflora.serve.models import Served

__all__ = ["Engine", "QueueFullError"]

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """No more jobs are taken for now."""


class _Lane:
    """Rows that can run together: one model, its running rows and the prompt that is being read.

    Args:
        model: The model.
        forward: Its forward pass.
    """

    def __init__(self, model: Any, forward: Forward) -> None:
        self.model, self.forward = model, forward
        self.config, self.device = model.config, next(model.parameters()).device
        # learned prompts come in front of a cache that only `generate` knows how to fill
        self.whole = hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning
        self.joins = joins(self.config) and not self.whole
        self.batch = Batch()
        self.waiting: deque[Job] = deque()
        self.reading: Prefill | None = None

    def jobs(self) -> list[Job]:
        """Those that run, and those whose prompts are read or next to be."""
        reading = self.reading  # which the computing thread may end meanwhile
        return [*self.batch.jobs, *(reading.jobs if reading else ()), *self.waiting]

    def room(self) -> bool:
        """Whether one more may join."""
        return self.joins or not self.jobs()

    def fail(self) -> None:
        """End all answers and let go of what they hold."""
        for job in self.jobs():
            job.close("failed")
        self.batch = Batch()
        self.reading = None
        self.waiting.clear()

    @torch.inference_mode()
    def round(self, chunk: int) -> None:
        """Write a token of every row, and read a chunk of the prompts that have waited longest."""
        self.batch.step(self.forward)
        self._drop()
        # jobs are held in one place at least whatever fails, so that `fail` finds them
        if self.whole and self.waiting:
            _whole(self.model, self.waiting[0])
            self.waiting.popleft()
            return
        if self.reading is None and self.waiting:
            self.reading = self._next(chunk)
            for _ in self.reading.jobs:
                self.waiting.popleft()
        if self.reading is not None:
            logits = self.reading.step(self.forward, chunk if self.joins else self.reading.longest)
            if logits is not None:
                self.batch.join(self.reading, logits)
                self.reading = None

    def _drop(self) -> None:
        """Let go of prompts that nobody waits for any more."""
        if self.reading is not None and all(job.cancelled for job in self.reading.jobs):
            for job in self.reading.jobs:
                job.close("cancelled")
            self.reading = None
        for job in [job for job in self.waiting if job.cancelled]:
            self.waiting.remove(job)
            job.close("cancelled")

    def _next(self, chunk: int) -> Prefill:
        """The prompt that has waited longest, and those behind it that fit into one chunk with it."""
        first, *others = self.waiting
        if not self.joins:
            return Prefill([first], self.config, self.device)
        if (common := self.batch.in_common(first)) is not None:
            return Prefill([first], self.config, self.device, self.batch.begun(*common))
        jobs, longest = [first], len(first.prompt)
        for job in others:
            longest = max(longest, len(job.prompt))
            if longest * (len(jobs) + 1) > chunk or self.batch.in_common(job) is not None:
                break
            jobs.append(job)
        return Prefill(jobs, self.config, self.device)


class Engine:
    """The queue and its one thread.

    Args:
        models: What is served, by name; the first is the base model.
        ends: Ids that end an answer.
        limits: The server's bounds.
    """

    def __init__(self, models: Mapping[str, Served], ends: Sequence[int], limits: Limits) -> None:
        self.models = models
        self.limits = limits
        self.metrics = Metrics()
        self._waiting: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="multiflora-generate")
        self._stopping = False
        base = next(iter(models.values())).model
        mixed = Mixed(base, models)
        shared = _Lane(base, mixed.forward)
        self._lanes = {
            name: shared if name in mixed.names else _Lane(one.model, _alone(one)) for name, one in models.items()
        }

    @property
    def running(self) -> list[Job]:
        """The jobs that are being answered."""
        return [job for lane in dict.fromkeys(self._lanes.values()) for job in lane.jobs()]

    @property
    def waiting(self) -> int:
        """How many jobs wait for room."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all the jobs of a request, or none of them.

        Raises:
            QueueFullError: Too many wait already, or the server is being stopped.
        """
        if self._stopping or len(self._waiting) + len(jobs) > self.limits.max_queue:
            raise QueueFullError
        for job in jobs:
            job.watcher = self.metrics
        self._waiting.extend(jobs)
        self._arrived.set()

    async def run(self) -> None:
        """Work until stopped."""
        loop = asyncio.get_running_loop()
        while not self._stopping:
            await self._arrived.wait()
            self._admit()
            if not self.running:
                if not self._waiting:
                    self._arrived.clear()
                continue
            for lane in dict.fromkeys(self._lanes.values()):
                if self._stopping or not lane.jobs():
                    continue
                done = loop.run_in_executor(self._pool, lane.round, self.limits.chunk)
                await asyncio.wait([done])
                if (error := done.exception()) is not None:
                    # whatever went wrong, e.g. no memory for this batch, concerns these answers alone
                    log.error("A batch of %d answers failed: %s", len(lane.jobs()), error, exc_info=error)
                    lane.fail()

    def _admit(self) -> None:
        """Let those that have waited longest begin, as long as there is room for them."""
        held = sum(job.room for job in self.running)
        count = len(self.running)
        left: deque[Job] = deque()
        full = False  # once one has no room, those behind it wait too: else a large one might wait for ever
        while self._waiting:
            job = self._waiting.popleft()
            lane = self._lanes[job.model]
            full = full or count >= self.limits.max_batch or held + job.room > self.limits.max_cache
            if job.cancelled:
                job.close("cancelled")
            elif not full and lane.room():
                lane.waiting.append(job)
                held, count = held + job.room, count + 1
            else:
                left.append(job)
        self._waiting = left

    async def stop(self) -> None:
        """Take no more jobs, end those there are, and let the thread finish."""
        self._stopping = True
        for job in (*self._waiting, *self.running):
            job.cancel()
        while self._waiting:
            self._waiting.popleft().close("cancelled")
        await asyncio.to_thread(self._pool.shutdown, wait=True)
        for job in self.running:
            job.close("cancelled")


class _Feed(LogitsProcessor):
    """Draws each token and hands it to the job; the drawn one is the only one that is left."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[0, next_token(self.job, scores[0])] = 0.0
        return only


class _Ended(StoppingCriteria):
    """Says when the job has its finish."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, input_ids: Tensor, scores: Any, **words: Any) -> Tensor:
        return torch.tensor([self.job.finish is not None], device=input_ids.device)


def _whole(model: Any, job: Job) -> None:
    """Write a whole answer by `generate`."""
    ids = torch.tensor([job.prompt], device=next(model.parameters()).device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=job.max_tokens, do_sample=False, pad_token_id=0, eos_token_id=sorted(job.ends) or None
        ),
        logits_processor=LogitsProcessorList([_Feed(job)]),
        stopping_criteria=StoppingCriteriaList([_Ended(job)]),
    )
    job.close("stop")  # where the model's own config has ended it


def _alone(served: Served) -> Forward:
    """The forward pass of a model whose rows run by themselves."""

    def forward(ids: Tensor, names: Sequence[str], tasks: Sequence[Any], **words: Any) -> Any:
        known = under_task(served.model, list(tasks)) if None not in tasks else nullcontext()
        with known:
            return served.model(input_ids=ids, **words)

    return forward
