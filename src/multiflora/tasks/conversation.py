"""Conversations as fine-tuning files have them: OpenAI's, trl's and ShareGPT's keys become turns, each of them checked.

A turn's content is a text, a whole number, or a list of parts of type text, which are put together as they stand. Turns
of tools, calls of tools, names and reasoning are handed to the model's chat template as they are; ``weight: 0`` takes
the loss from an assistant's turn. Everything else (images, audio, unknown keys) is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from multiflora.errors import DataError
from multiflora.suggest import nearest
from multiflora.tasks.example import Message
from multiflora.tasks.values import as_list, shown, text_of

__all__ = ["plain_text", "read_tools", "read_turns", "said", "trained_part"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names of who speaks; system, user, assistant and tool are as everywhere."""
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight")
_FOR_TEMPLATE = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def read_turns(value: Any, what: str, where: str) -> list[tuple[Message, float]]:
    """Read a conversation.

    Args:
        value: A list of turns, or JSON text of one (as a CSV file has it); or a list of such, one after the other.
        what: What it is, for messages: ``messages of task t``.
        where: The row's place.

    Returns:
        The turns, and the weight of each: 0 or 1.

    Raises:
        DataError: A turn has no form that is known; it is named.

    Example:
        >>> read_turns([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "messages", "row 1")[1][0]
        Message(role='assistant', content='Hello', more='', loss=False)
    """
    turns = as_list(value)
    parts = [as_list(turn) for turn in turns or ()]
    if all(part is not None for part in parts):
        turns = [turn for part in parts for turn in part or ()] if parts else turns
    if turns is None:
        raise DataError(f"{where}: the {what} give {shown(value)}; expected a list of turns with 'role' and 'content'.")
    return [_turn(turn, f"turn {number} of the {what}", where) for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, what: str, where: str) -> tuple[Message, float]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: {what} is {shown(turn)}; expected 'role' and 'content'.")
    keys = {key: value for key, value in turn.items() if value is not None}  # Parquet writes out what a turn lacks
    if {"from", "value"} <= set(keys) and not {"role", "content"} & set(keys):
        keys |= {"role": keys.pop("from"), "content": keys.pop("value")}
    role = _role(keys.get("role"), what, where)
    for key in keys:
        if key not in _KEYS:
            raise DataError(
                f"{where}: {what} has the key {shown(key)}, which cannot be read; known are {', '.join(_KEYS)}. Take "
                "it out of the row, or write the turns with a template."
            )
    more = {key: keys[key] for key in _FOR_TEMPLATE if key in keys}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in more:
            more[key] = text_of(more[key], f"{key} of {what}", where)
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], role, what, where)
    content = _content(keys, bool(more.get("tool_calls")), what, where)
    return Message(role, content, json.dumps(more, ensure_ascii=False) if more else ""), _weight(keys, what, where)


def _role(role: Any, what: str, where: str) -> str:
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if isinstance(role, str) and role in ROLES:
        return role
    if role is None:
        raise DataError(f"{where}: {what} does not say who speaks; expected 'role' and 'content'.")
    guess = nearest(str(role)[:50], ROLES)
    raise DataError(
        f"{where}: {what} has the role {shown(role)}; expected one of {', '.join((*ROLES, *_SHAREGPT))}."
        + (f" Did you mean {guess}?" if guess else "")
    )


def _content(turn: Mapping[str, Any], has_calls: bool, what: str, where: str) -> str:
    content = turn.get("content")
    if content is None:
        if has_calls:
            return ""
        raise DataError(f"{where}: {what} has no content; expected 'role' and 'content'.")
    if not isinstance(content, list | tuple):
        return text_of(content, f"content of {what}", where)
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            named = f"a part of type {shown(kind)}" if isinstance(kind, str) and kind != "text" else shown(part)
            raise DataError(
                f"{where}: the content of {what} holds {named}; expected parts of the form "
                '{"type": "text", "text": "..."}. Only text can be trained on: leave such rows out with \'keep\'.'
            )
        texts.append(part["text"])
    return "".join(texts)


def _weight(turn: Mapping[str, Any], what: str, where: str) -> float:
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: {what} has the weight {shown(weight)}; expected 0 (no loss on this turn) or 1.")
    return float(weight)


def _calls(value: Any, role: str, what: str, where: str) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form, the arguments as a mapping: templates write those as JSON themselves."""
    calls = as_list(value)
    if calls is None or role != "assistant":
        raise DataError(
            f"{where}: {what} has the tool_calls {shown(value)}; expected a list of calls in a turn of the assistant."
        )
    return [_call(call, what, where) for call in calls]


def _call(call: Any, what: str, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise DataError(
            f"{where}: {what} has the tool call {shown(call)}; expected "
            '{"type": "function", "function": {"name": "...", "arguments": "{...}"}}, the arguments as a JSON object.'
        )
    words = {} if call.get("id") is None else {"id": call["id"]}
    return {**words, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def read_tools(value: Any, what: str, where: str) -> str:
    """Read the list of tools of a conversation, as JSON text; empty where there are none.

    Raises:
        DataError: It is no list of mappings.
    """
    if value is None or value == "":
        return ""
    tools = as_list(value)
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: the {what} give {shown(value)}; expected a list of tools as JSON objects.")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def trained_part(turns: Sequence[tuple[Message, float]], train_on: str, what: str, where: str) -> tuple[Message, ...]:
    """Mark which turns carry loss, and end the conversation with the last of them.

    Args:
        turns: The turns and their weights.
        train_on: ``last`` or ``all``: which of the assistant's turns carry loss, those of weight 0 aside.
        what: For messages.
        where: The row's place.

    Raises:
        DataError: The conversation ends with somebody else, begins with the assistant, or has only weights of 0.
    """
    messages = [message for message, _ in turns]
    if not messages or messages[0].role in ("assistant", "tool"):
        who = "empty" if not messages else f"opened by the {messages[0].role}"
        raise DataError(f"{where}: the {what} are {who}; expected a user first.")
    if messages[-1].role != "assistant":
        return tuple(messages)
    trained = [i for i, (message, weight) in enumerate(turns) if message.role == "assistant" and weight]
    if not trained:
        raise DataError(
            f"{where}: the {what} have weight 0 in every turn of the assistant; there is nothing to learn. "
            "Leave such rows out with 'keep'."
        )
    last = trained[-1]
    marks = set(trained[:-1]) if train_on == "all" else set()
    return tuple(message._replace(loss=i in marks) for i, message in enumerate(messages[: last + 1]))


def said(message: Message) -> str:
    """What a turn says where there is no chat template: reasoning in think marks, text, tool calls as lines of JSON."""
    turn = message.for_template()
    thought = turn.get("reasoning_content", "").strip()
    lines = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    text = "\n".join(part for part in (message.content.strip(), *lines) if part)
    return f"<think>\n{thought}\n</think>\n\n{text}" if thought else text


def plain_text(messages: Sequence[Message]) -> str:
    """Write a conversation without a chat template, for models that have none.

    Example:
        >>> plain_text([Message("user", "Hi")])
        'User: Hi\\nAssistant:'
    """
    lines = []
    for message in messages:
        name = message.for_template().get("name")
        lines.append(f"{message.role.capitalize()}{f' ({name})' if name else ''}: {said(message)}")
    return "\n".join(lines) + "\nAssistant:"
