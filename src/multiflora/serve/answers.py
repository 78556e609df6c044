"""What goes back to a client: OpenAI's objects, as plain values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from multiflora.serve.job import Piece, Told

__all__ = ["Answer", "error_body", "model_card", "sse"]

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""


class Answer:
    """Builds the objects of one request.

    Args:
        chat: Whether it is a chat.
        id: Of the answer.
        model: Name of the model.
        created: Seconds since 1970.
    """

    def __init__(self, *, chat: bool, id: str, model: str, created: int) -> None:
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": id, "object": kind, "created": created, "model": model}

    def whole(self, pieces: Sequence[Piece], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The answer at once.

        Args:
            pieces: Each choice.
            prompt_tokens: Of all prompts.
            tokens: Of all answers.
        """
        choices = [
            {"index": index, "finish_reason": p.finish, "logprobs": self._logprobs(p.told), **self._text(p.text)}
            for index, p in enumerate(pieces)
        ]
        return {**self._head, "choices": choices, "usage": _usage(prompt_tokens, tokens)}

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}

    def opening(self, index: int) -> str | None:
        """The first event of a choice, which only a chat has."""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def piece(self, index: int, piece: Piece, start: int = 0) -> str:
        """Some text of a choice as an event; ``start``: how many characters of it went before."""
        text, finish, told = piece
        if not self.chat:
            return self._event(index, {"text": text}, finish, self._logprobs(told, start))
        delta = {"content": text} if text or finish is None else {}
        return self._event(index, {"delta": delta}, finish, self._logprobs(told))

    def _logprobs(self, told: Sequence[Told], start: int = 0) -> dict[str, Any] | None:
        """The tokens' logarithmic probabilities in the form of the request's kind; None where none were asked for."""
        if not told:
            return None
        if self.chat:
            return {
                "content": [
                    {**_chance(t.token, t.logprob), "top_logprobs": [_chance(*other) for other in t.top]} for t in told
                ],
                "refusal": None,
            }
        places = list(accumulate((len(t.token) for t in told), initial=start))[:-1]
        return {
            "tokens": [t.token for t in told],
            "token_logprobs": [max(t.logprob, -9999.0) for t in told],
            "top_logprobs": [{token: max(value, -9999.0) for token, value in t.top} for t in told],
            "text_offset": places,
        }

    def usage(self, prompt_tokens: int, tokens: int) -> str:
        """The event that tells the tokens of a stream."""
        return sse({**self._chunk(), "choices": [], "usage": _usage(prompt_tokens, tokens)})

    def _chunk(self) -> dict[str, Any]:
        return {**self._head, **({"object": "chat.completion.chunk"} if self.chat else {})}

    def _event(
        self, index: int, content: dict[str, Any], finish: str | None, logprobs: dict[str, Any] | None = None
    ) -> str:
        choice = {"index": index, "finish_reason": finish, "logprobs": logprobs, **content}
        return sse({**self._chunk(), "choices": [choice]})


def _chance(token: str, logprob: float) -> dict[str, Any]:
    # JSON has no word for minus infinity; OpenAI writes -9999 for what cannot come
    return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}


def sse(value: Any) -> str:
    r"""One server-sent event.

    Example:
        >>> sse({"a": 1})
        'data: {"a": 1}\n\n'
    """
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_card(name: str, base: str, tasks: Sequence[str], created: int) -> dict[str, Any]:
    """A served model in the list of models; ``parent`` and ``tasks`` are beyond OpenAI's."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "multiflora"}
    return card | {"parent": None if name == base else base, "tasks": list(tasks)}


def _usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
