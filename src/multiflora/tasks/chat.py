"""From an Example to the texts that are tokenised, with or without the model's chat template.

The template renders the whole conversation once, and what carries loss is cut out of that one text. The cut before an
answer is where the template's own generation prompt ends, which is what a server sends to the model: a think block that
the template opens after it is part of the answer. So

    text before the answer = what is served;    text before + answer = what the template writes.

Where a turn's text ends is found by writing a stand-in in its place. A template for which this does not hold, or that
leaves out what a turn says, is refused: there is no loss on its answers that would be right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from multiflora.errors import ConfigError, DataError
from multiflora.tasks.chat_template import Asked, render_all, render_chat
from multiflora.tasks.example import Example, Message, answered

__all__ = ["Span", "ahead", "answer_in", "around_answer", "as_text", "opened", "spans_of"]

Span = tuple[str, bool]
"""A stretch of text, and whether it carries loss."""

_STAND_IN = "the-answer-stands-here"
_OPEN = {"add_generation_prompt": True}
AHEAD = 64
"""Examples that are rendered in one call."""
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^<>\[\]\s]+")


def as_text(example: Example, tokenizer: Any, chat_template: bool) -> tuple[str, str]:
    """Return the prompt and the completion as they are tokenised: what is read before the last answer, and that.

    Without a chat template they are the example's own. With one, the conversation goes through it (a plain prompt is
    one user turn); the prompt ends where the template lets the assistant begin and the completion is the rest of its
    turn, up to the end-of-text token, which is appended when the completion is tokenised.

    Args:
        example: The rendered row.
        tokenizer: A transformers tokenizer; looked at only with ``chat_template``.
        chat_template: Whether to use the tokenizer's template.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that allows no loss on the answer alone.
        DataError: The template refuses the conversation, or leaves out a part of it.
    """
    *before, (completion, _) = spans_of(example, tokenizer, chat_template)
    return "".join(text for text, _ in before), completion


def spans_of(example: Example, tokenizer: Any, chat_template: bool) -> list[Span]:
    """Return the whole text of an example in stretches with and without loss; the last one is the completion.

    Args:
        example: The rendered row.
        tokenizer: A transformers tokenizer.
        chat_template: Whether to use the tokenizer's template.

    Raises:
        ConfigError, DataError: See `as_text`.
    """
    if not chat_template:
        return _plain_spans(example)
    turns = _turns(example)
    whole = _rendered(turns, tokenizer, example)
    if _STAND_IN in whole:
        raise DataError(f"{example.id}: the conversation holds {_STAND_IN!r}, which stands for answers here.")
    _check_nothing_lost(turns, whole, example, tokenizer)
    spans: list[Span] = []
    done = 0
    for i, turn in enumerate(turns[:-1]):
        if turn.loss:
            start, end = _place(turns, i, whole, tokenizer, example)
            spans += [(whole[done:start], False), (whole[start:end], True)]
            done = end
    prompt = _rendered(turns[:-1], tokenizer, example, is_open=True)
    if not whole.startswith(prompt):
        raise _other_prefix(prompt, whole, example, tokenizer)
    _, closing = _around(turns, len(turns) - 1, tokenizer, example)
    return [*spans, (whole[done : len(prompt)], False), (_up_to_eos(whole[len(prompt) :], closing, tokenizer), True)]


def _plain_spans(example: Example) -> list[Span]:
    """Without a template; earlier answers are found by their place in the text that the task wrote."""
    if not any(turn.loss for turn in example.messages):
        return [(example.prompt, False), (example.completion, True)]
    from multiflora.tasks.conversation import plain_text, said

    spans: list[Span] = []
    done = 0
    for i, turn in enumerate(example.messages[:-1]):
        if turn.loss:
            start = len(plain_text(example.messages[:i]))
            end = start + len(f" {said(turn)}\n")  # the line end closes a turn
            spans += [(example.prompt[done:start], False), (example.prompt[start:end], True)]
            done = end
    return [*spans, (example.prompt[done:], False), (example.completion, True)]


def opened(turns: Sequence[Mapping[str, Any]], tokenizer: Any, tools: Any = None) -> str:
    """Return a conversation as a server sends it to the model: rendered, up to where the assistant begins.

    Args:
        turns: Its turns, as the template reads them.
        tokenizer: A transformers tokenizer with a chat template.
        tools: The tools that may be called.

    Raises:
        ValueError: The template refuses the turns, or would take or make too much.
    """
    return render_chat(Asked(turns, tools, _OPEN), tokenizer)


def ahead(examples: Sequence[Example], tokenizer: Any, chat_template: bool) -> Iterator[Example]:
    """Go through examples while what a chat template makes of them is rendered ahead, many in one call.

    `spans_of` and `around_answer` then have the texts at hand, of an example and of its other choices.
    """
    if not chat_template or not getattr(tokenizer, "chat_template", None):
        yield from examples
        return
    for start in range(0, len(examples), AHEAD):
        chunk = examples[start : start + AHEAD]
        wanted = list(dict.fromkeys(key for example in chunk for key in _keys(example)))
        texts = render_all([_asked(*key) for key in wanted], tokenizer)
        _ready.update({key: (tokenizer, text) for key, text in zip(wanted, texts, strict=True) if text is not None})
        try:
            yield from chunk
        finally:
            _ready.clear()


_Key = tuple[tuple[Message, ...], str, bool]
_ready: dict[_Key, tuple[Any, str]] = {}
"""What `ahead` has rendered: turns, tools, whether the assistant is to begin -> the tokenizer, the text."""


def _keys(example: Example) -> Iterator[_Key]:
    """What will be asked of the template for an example, and for each of its choices."""
    for text in example.choices or (None,):
        turns = _turns(example if text is None else answered(example, text))
        last = len(turns) - 1
        yield turns, example.tools, False
        yield turns[:-1], example.tools, True
        for i, turn in enumerate(turns):
            if turn.loss or i == last:
                yield _with_stand_in(turns, i), example.tools, False
            if turn.loss and i != last:
                yield _with_stand_in(turns[: i + 1], i), example.tools, False
                yield turns[:i], example.tools, True
    turns = _turns(example)
    yield (*turns[:-1], Message("assistant", _STAND_IN)), example.tools, False


def _asked(turns: Sequence[Message], tools: str, is_open: bool) -> Asked:
    read = [turn.for_template() for turn in turns]
    return Asked(read, json.loads(tools) if tools else None, _OPEN if is_open else {})


def around_answer(example: Example, tokenizer: Any, chat_template: bool) -> tuple[str, str]:
    """Return what the template writes around an answer, in the completion: before it and behind it.

    Both are empty without a template. A model that was trained on completions writes both, and neither is its answer:
    see `answer_in`. Special tokens behind the answer are left out where the tokenizer leaves them out of text.
    """
    if not chat_template:
        return "", ""
    turns = _turns(example)
    plain = (*turns[:-1], Message("assistant", _STAND_IN))
    prompt = _rendered(turns[:-1], tokenizer, example, is_open=True)
    before, behind = _around(plain, len(plain) - 1, tokenizer, example)
    return before[len(prompt) :] if before.startswith(prompt) else "", _up_to_eos(behind, behind, tokenizer)


def answer_in(text: str, around: tuple[str, str]) -> str:
    r"""Take out of a generated text what stands around the answer, see `around_answer`.

    Example:
        >>> answer_in("<think>\n2 and 2\n</think>\n\n4[end]\n", ("<think>\n\n</think>\n\n", "[end]\n"))
        '4'
    """
    before, behind = (part.strip() for part in around)
    marks = _MARK.findall(before)
    if marks:
        text = text.rpartition(marks[-1])[2].lstrip()
    return text.partition(behind)[0] if behind else text


def _turns(example: Example) -> tuple[Message, ...]:
    return example.messages or (
        Message("user", example.prompt.strip()),
        Message("assistant", example.completion.strip()),
    )


def _rendered(turns: Sequence[Message], tokenizer: Any, example: Example, *, is_open: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"model.chat_template is true, but the tokenizer of {_name(tokenizer)} has no chat template. "
            "Set it to false, or use the instruction-tuned model of that family."
        )
    key = (tuple(turns), example.tools, is_open)
    held, text = _ready.get(key, (None, ""))
    if held is tokenizer:
        return text
    try:
        return render_chat(_asked(*key), tokenizer)
    except ValueError as error:
        told = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(
            f"{example.id}: the chat template of {_name(tokenizer)} refuses this conversation "
            f"({', '.join(turn.role for turn in turns)}): {told}. Leave such rows out with 'keep', or set "
            "model.chat_template to false."
        ) from error


def _with_stand_in(turns: Sequence[Message], i: int) -> tuple[Message, ...]:
    return (*turns[:i], turns[i]._replace(content=_STAND_IN), *turns[i + 1 :])


def _around(turns: Sequence[Message], i: int, tokenizer: Any, example: Example) -> tuple[str, str]:
    """The text before and behind what a turn says, found by a stand-in: a short answer may stand elsewhere, too."""
    before, found, behind = _rendered(_with_stand_in(turns, i), tokenizer, example).partition(_STAND_IN)
    if not found:
        raise ConfigError(
            f"the chat template of {_name(tokenizer)} does not write what the assistant says, so there is nothing to "
            "learn. Set model.chat_template to false."
        )
    return before, behind


def _place(turns: Sequence[Message], i: int, whole: str, tokenizer: Any, example: Example) -> tuple[int, int]:
    """Where an answer before the last one begins and ends in the whole text, the mark that closes it included."""
    before, behind = _around(turns, i, tokenizer, example)
    closing = _around(turns[: i + 1], i, tokenizer, example)[1]
    prompt = _rendered(turns[:i], tokenizer, example, is_open=True)
    start = len(prompt) if whole.startswith(prompt) else len(before)
    if not (whole.startswith(before) and whole.endswith(behind)) or start > len(before):
        raise ConfigError(
            f"{example.id}: the chat template of {_name(tokenizer)} writes an earlier answer in a way that cannot be "
            "told from the rest, so no loss on it is possible. Leave 'train_on: all' out of the task."
        )
    mark = closing[: _equal_beginning(closing, behind)]
    return start, len(whole) - len(behind) + len(_with_eos(mark, tokenizer))


def _with_eos(closing: str, tokenizer: Any) -> str:
    """The end of a turn up to and with the end-of-text token, or all of it where there is none."""
    eos = tokenizer.eos_token
    head, found, _ = closing.partition(eos) if eos else (closing, "", "")
    return head + found


def _up_to_eos(completion: str, closing: str, tokenizer: Any) -> str:
    """The completion without the end-of-text token and what is behind it."""
    eos = tokenizer.eos_token
    if not eos or eos not in closing or not completion.endswith(closing):
        return completion.rpartition(eos)[0] if eos and completion.rstrip().endswith(eos) else completion
    return completion[: len(completion) - len(closing)] + closing.partition(eos)[0]


def _check_nothing_lost(turns: Sequence[Message], whole: str, example: Example, tokenizer: Any) -> None:
    """Refuse a conversation of which the template writes only a part; old reasoning may go, as templates mean it to."""
    for number, turn in enumerate(turns, start=1):
        more = turn.for_template()
        texts = {"what it says": _THOUGHT.sub("", turn.content).strip()}
        called = [call["function"]["name"] for call in more.get("tool_calls", ())]
        texts |= {f"its call of {name}": name for name in called}
        if number == len(turns):
            thoughts = [more.get("reasoning_content", ""), *_THOUGHT.findall(turn.content)]
            texts["its reasoning"] = next((text.strip() for text in thoughts if text.strip() not in whole), "")
        lost = next((what for what, text in texts.items() if text not in whole), None)
        if lost:
            raise DataError(
                f"{example.id}: the chat template of {_name(tokenizer)} leaves out of turn {number} ({turn.role}) "
                f"{lost}, so the model would never see it. Leave such rows out with 'keep', or use a model whose "
                "template writes it."
            )
    for tool in json.loads(example.tools) if example.tools else ():
        name = (tool.get("function") or tool).get("name")
        if isinstance(name, str) and name not in whole:
            raise DataError(
                f"{example.id}: the chat template of {_name(tokenizer)} leaves out the tool {name!r}. Use a model "
                "whose template writes tools, or leave the column out of the file."
            )


def _equal_beginning(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _other_prefix(prompt: str, whole: str, example: Example, tokenizer: Any) -> ConfigError:
    same = _equal_beginning(prompt, whole)
    return ConfigError(
        f"the chat template of {_name(tokenizer)} writes an answered conversation in another way than an open one, so "
        f"what is trained could not be what is served: after {whole[max(same - 40, 0) : same]!r} comes "
        f"{whole[same : same + 40]!r} where there is an answer and {prompt[same : same + 40]!r} where one is to be "
        f"written ({example.id}). Set model.chat_template to false, or give the tokenizer another template."
    )


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "this model")
