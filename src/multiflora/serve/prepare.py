"""From a request to jobs: model, task, tokens and limits checked, each fault in words."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from multiflora.data.check import context_length
from multiflora.data.encode import prompt_ids
from multiflora.errors import AdapterError
from multiflora.serve.job import Job
from multiflora.serve.limits import Limits
from multiflora.serve.models import Served
from multiflora.serve.schema import ChatRequest, CompletionRequest, Request
from multiflora.tasks.chat import opened

__all__ = ["RefusedError", "prepare", "unknown_model"]


class RefusedError(ValueError):
    """A request that cannot be met: the message, an HTTP status, OpenAI's words for it."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def prepare(
    request: ChatRequest | CompletionRequest,
    task: str | None,
    models: Mapping[str, Served],
    tokenizer: Any,
    ends: Sequence[int],
    limits: Limits,
    loop: asyncio.AbstractEventLoop,
) -> list[Job]:
    """Make a job for each prompt of a request.

    Args:
        request: What is asked.
        task: What the header X-Multiflora-Task says.
        models: What is served.
        tokenizer: The base model's.
        ends: Ids that end an answer.
        limits: The server's bounds.
        loop: The event loop that reads the answers.

    Raises:
        RefusedError: Something in it cannot be met.
    """
    served = models.get(request.model)
    if served is None:
        raise unknown_model(request.model, models)
    chosen = _task(served, request, task)
    prompts = _chat(request, tokenizer) if isinstance(request, ChatRequest) else _texts(request, tokenizer, limits)
    asked = getattr(request, "max_completion_tokens", None) or request.max_tokens
    room = context_length(served.model.config)
    return [
        Job(
            model=served.name,
            prompt=prompt,
            max_tokens=_length(prompt, asked, room, limits),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=None if request.seed is None else request.seed + index,
            stops=request.stops(),
            task=chosen,
            tokenizer=tokenizer,
            ends=ends,
            loop=loop,
            alternatives=request.alternatives(),
        )
        for index, prompt in enumerate(prompts)
    ]


def unknown_model(name: str, models: Mapping[str, Served]) -> RefusedError:
    """The error for a name that is not served."""
    message = f"There is no model {name!r}; served are {', '.join(models)}."
    return RefusedError(message, 404, "model", "model_not_found")


def _task(served: Served, request: Request, header: str | None) -> str | int | None:
    if header is not None and request.task is not None and header != str(request.task):
        raise RefusedError(
            f"The header X-Multiflora-Task says {header!r} and the field task {request.task!r}; send one.", 400, "task"
        )
    try:
        return served.task_of(request.task if header is None else header)
    except AdapterError as error:
        raise RefusedError(str(error), 400, "task", "task_not_found") from error


def _chat(request: ChatRequest, tokenizer: Any) -> list[list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise RefusedError("This model has no chat template; use /v1/completions with a prompt.", 400, "messages")
    turns = [message.for_template() for message in request.messages]
    try:
        text = opened(turns, tokenizer)
    except ValueError as error:
        raise RefusedError(f"The model's chat template refuses these messages: {error}", 400, "messages") from error
    return [prompt_ids(text, tokenizer, chat_template=True)]


def _texts(request: CompletionRequest, tokenizer: Any, limits: Limits) -> list[list[int]]:
    prompts = request.prompts()
    if not prompts or len(prompts) > limits.max_prompts:
        raise RefusedError(f"There are {len(prompts)} prompts; expected 1 to {limits.max_prompts}.", 400, "prompt")
    ids = [prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else prompt for prompt in prompts]
    for found in ids:
        strange = [token for token in found if not 0 <= token < len(tokenizer)]
        if strange:
            raise RefusedError(
                f"Token {strange[0]} does not exist; ids go from 0 to {len(tokenizer) - 1}.", 400, "prompt"
            )
    # an empty prompt begins where texts begin
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [found or [first] for found in ids]


def _length(prompt: list[int], asked: int | None, room: int | None, limits: Limits) -> int:
    """How many tokens an answer may have."""
    if asked is not None and asked > limits.max_tokens:
        raise RefusedError(f"max_tokens is {asked}; this server writes at most {limits.max_tokens}.", 400, "max_tokens")
    wanted = asked or limits.max_tokens
    who = "the model" if room is not None and room <= limits.max_cache else "this server"
    room = limits.max_cache if room is None else min(room, limits.max_cache)
    left = room - len(prompt)
    if left < 1 or (asked is not None and asked > left):
        raise RefusedError(
            f"The prompt has {len(prompt)} tokens and the answer may have {asked or 1}, but {who} holds {room} "
            "together. Send a shorter prompt or ask for fewer tokens.",
            400,
            "messages" if asked is None else "max_tokens",
            "context_length_exceeded",
        )
    return min(wanted, left)
