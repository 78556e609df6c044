"""Example: one rendered row, the record that data, training and evaluation speak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Example", "Message"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """Who speaks: system, user or assistant."""
    content: str
    """What is said, without any marks of a chat template."""


@dataclass(frozen=True)
class Example:
    """What the model reads (``prompt``) and should write (``completion``); the loss is on the completion only."""

    task: str
    """Name of the task."""
    id: str
    """Stable name of the row, e.g. ``gsm8k-train-17``."""
    prompt: str
    """The text before the loss starts. Ends without a space."""
    completion: str
    """The text that carries the loss. Starts with its own space; the end of text is added with the tokens."""
    choices: tuple[str, ...] = ()
    """All candidate completions of a multiple-choice row, else empty."""
    answer: int | str | None = None
    """Index into ``choices``; without choices, the reference that the scorer compares with."""
    messages: tuple[Message, ...] = ()
    """The conversation of a messages task, the last turn being the assistant's completion; else empty."""
