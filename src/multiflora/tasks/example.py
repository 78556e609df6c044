"""Example: one rendered row, the record that data, training and evaluation speak."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

__all__ = ["Example", "Message", "answered"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """Who speaks: system, developer, user, assistant or tool."""
    content: str
    """What is said, without any marks of a chat template."""
    more: str = ""
    """JSON of what else a chat template may write of the turn: name, tool_calls, tool_call_id, reasoning_content."""
    loss: bool = False
    """Whether an assistant's turn before the last one carries loss too; the last one always does."""

    def for_template(self) -> dict[str, Any]:
        """The turn as a chat template reads it.

        Example:
            >>> Message("user", "Hi", '{"name": "Ada"}').for_template()
            {'role': 'user', 'content': 'Hi', 'name': 'Ada'}
        """
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


@dataclass(frozen=True)
class Example:
    """What the model reads (``prompt``) and should write (``completion``); the loss is on the completion only."""

    task: str
    """Name of the task."""
    id: str
    """Stable name of the row, e.g. ``gsm8k-train-17``."""
    prompt: str
    """The text before the loss starts."""
    completion: str
    """The text that carries the loss. Starts with its own space; the end of text is added with the tokens."""
    choices: tuple[str, ...] = ()
    """All candidate completions of a multiple-choice row, else empty."""
    answer: int | str | None = None
    """Index into ``choices``; without choices, the reference that the scorer compares with."""
    messages: tuple[Message, ...] = ()
    """The conversation of a messages task, the last turn being the assistant's completion; else empty."""
    tools: str = ""
    """JSON list of the tools that the conversation's assistant may call, for the chat template; else empty."""
    rejected: str = ""
    """A worse completion, which a preference is measured against (``train.objective: dpo``); else empty."""


def answered(example: Example, completion: str) -> Example:
    """The same example with another completion.

    Example:
        >>> answered(Example("t", "t-0", "1 + 1 =", " 2"), " 3").completion
        ' 3'
    """
    turns = example.messages and (*example.messages[:-1], Message("assistant", completion.strip()))
    return replace(example, completion=completion, messages=turns)
