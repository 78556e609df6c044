"""From a row of a data set to an Example: templates, choices, answer, each checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Undefined

from multiflora.errors import DataError
from multiflora.suggest import nearest
from multiflora.tasks.conversation import plain_text, read_tools, read_turns, said, trained_part
from multiflora.tasks.decimals import whole_number
from multiflora.tasks.example import Example, Message
from multiflora.tasks.jinja import (
    Failure,
    NotTextError,
    NullPrintedError,
    columns_of,
    expression,
    template,
)
from multiflora.tasks.label import index_of
from multiflora.tasks.spec import TaskSpec
from multiflora.tasks.values import as_list, is_text, kind_of, shown, text_of

__all__ = ["evaluated", "keeps", "render"]

_HALF = re.compile("[\ud800-\udfff]")


def keeps(spec: TaskSpec, row: Mapping[str, Any], where: str) -> bool:
    """Say whether the row passes the task's ``keep`` condition."""
    return spec.keep is None or bool(evaluated(spec.keep, row, f"keep of task {spec.name}", where))


def render(spec: TaskSpec, row: Mapping[str, Any], where: str, id: str | None = None) -> Example:
    """Turn one row into an Example.

    Args:
        spec: The task.
        row: The row, column -> value.
        where: The row's place, for messages: ``train.jsonl, line 7``.
        id: Name of the row where the task has no expression for it; None is ``where``.

    Raises:
        DataError: A template names a missing column or fails on this row, the text is empty, or the answer is not
            among the choices.

    Example:
        >>> from multiflora.tasks import load_task
        >>> spec = load_task({"name": "sums", "source": "sums/", "prompt": "{{ q }} =", "completion": " {{ a }}"})
        >>> example = render(spec, {"q": "1 + 2", "a": 3}, "row 0")
        >>> example.prompt, example.completion
        ('1 + 2 =', ' 3')
    """
    row_id = _row_id(spec, row, where) if spec.id else (id or where)
    choices, labels = _choices(spec, row, where)
    answer = _answer(spec, row, choices, labels, where)
    messages = _messages(spec, row, where) if spec.messages is not None else ()
    last = None
    if messages and messages[-1].role == "assistant":
        messages, last = messages[:-1], messages[-1]
    prompt = plain_text(messages) if messages else _text(spec.prompt or "", row, f"prompt of task {spec.name}", where)
    completion = _completion(spec, row, choices, answer, last, where)
    if not prompt.strip():
        raise DataError(f"{where}: the prompt of task {spec.name} is empty. Leave such rows out with 'keep'.")
    if not completion.strip():
        raise DataError(
            f"{where}: the completion of task {spec.name} is empty; there is nothing to learn from it. "
            "Leave such rows out with 'keep', e.g. keep: output | trim."
        )
    rejected = "" if spec.rejected is None else _rejected(spec, row, where)
    # the file's own last turn, whole, where it is the completion; else a turn that says the completion
    end = last if last is not None and completion == f" {said(last)}" else Message("assistant", completion.strip())
    turns = (*messages, end) if messages else ()
    what = f"tools of task {spec.name}"
    tools = read_tools(evaluated(spec.tools, row, what, where), what, where) if spec.tools else ""
    texts = {
        "messages": "".join(text for turn in turns for text in (turn.content, turn.more)),
        "prompt": prompt,
        "choices": "".join(choices),
        "completion": completion,
        "rejected": rejected,
        "answer": str(answer),
        "tools": tools,
        "id": row_id,
    }
    _check_text(texts, spec, where)
    _check_reference(spec, answer, where)
    return Example(spec.name, row_id, prompt, completion, choices, answer, turns, tools, rejected)


def evaluated(source: str, row: Mapping[str, Any], what: str, where: str) -> Any:
    """Evaluate a Jinja expression on a row; a mistake is a DataError that names the columns there are."""
    value = _guarded(lambda: expression(source, row), source, row, what, where, is_expression=True)
    if isinstance(value, Undefined):
        raise DataError(_missing(source, row, what, where, "it has no value", is_expression=True))
    return value


def _text(source: str, row: Mapping[str, Any], what: str, where: str) -> str:
    return str(_guarded(lambda: template(source, row), source, row, what, where, is_expression=False))


def _guarded(
    call: Callable[[], Any],
    source: str,
    row: Mapping[str, Any],
    what: str,
    where: str,
    *,
    is_expression: bool,
) -> Any:
    try:
        return call()
    except NotTextError as error:
        raise DataError(
            f"{where}: the {what}{_column_of(error.value, source, row)} prints {shown(error.value)}, "
            f"{kind_of(error.value)}; expected a text or a whole number: {source!r}. Make a text of it in the "
            "template, e.g. {{ column | string }}, or leave such rows out with 'keep'."
            f"{_as_messages(error.value, source)}"
        ) from error
    except NullPrintedError as error:
        raise DataError(
            f"{where}: the {what} prints a null: {source!r}. Leave such rows out with 'keep', "
            "or give a default, e.g. {{ column or '' }}."
        ) from error
    except Failure as error:
        raise DataError(_missing(source, row, what, where, str(error), is_expression=is_expression)) from error


def _missing(source: str, row: Mapping[str, Any], what: str, where: str, why: str, *, is_expression: bool) -> str:
    absent = sorted(columns_of(source, is_expression=is_expression) - set(row) - {"row"})
    columns = ", ".join(map(str, row)) or "none"
    if not absent:
        return f"{where}: the {what} fails on this row: {why}; it is {source!r}. The columns are {columns}."
    guess = nearest(absent[0], [str(c) for c in row])
    meant = f" Did you mean {guess}?" if guess else ""
    named = ", ".join(absent)
    return f"{where}: the {what} names the column {named}, which is not there; the columns are {columns}.{meant}"


def _as_messages(value: Any, source: str) -> str:
    """Say which setting reads what a template of text cannot print: a list of turns."""
    names = sorted(columns_of(source, is_expression=False))
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value) or not names:
        return ""
    return f" A conversation is a task's messages: {'[prompt, completion]' if names == ['prompt'] else names[0]}."


def _column_of(value: Any, source: str, row: Mapping[str, Any]) -> str:
    """Name the column that a template prints, where the value is one's."""
    # by its writing: the value has come back from another process, and NaN equals nothing
    names = [
        name
        for name in sorted(columns_of(source, is_expression=False))
        if name in row and type(row[name]) is type(value) and shown(row[name]) == shown(value)
    ]
    return f" (column {names[0]})" if names else ""


def _read_from(key: str, source: object) -> str:
    """Name the column that a key of a task reads, where that has another name."""
    return f" (column {source})" if isinstance(source, str) and source.isidentifier() and source != key else ""


def _row_id(spec: TaskSpec, row: Mapping[str, Any], where: str) -> str:
    what = f"id of task {spec.name}"
    return text_of(evaluated(spec.id or "", row, what, where), what + _read_from("id", spec.id), where)


def _choices(spec: TaskSpec, row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The candidate completions, and the names that the data set gives them."""
    what = f"choices of task {spec.name}"
    if spec.choices is None:
        return (), ()
    labels: Any = spec.labels
    if isinstance(spec.choices, str):
        value = evaluated(spec.choices, row, what, where)
        if isinstance(value, Mapping) and "text" in value:  # as ARC and others have it: {text: [...], label: [...]}
            labels = value.get("label") if labels is None else labels
            value = value["text"]
        texts = as_list(value)
        if texts is None or not all(isinstance(c, str) for c in texts):
            raise DataError(
                f"{where}: the {what} give {shown(value)}; expected a list of texts. The expression is "
                f"{spec.choices!r}; {spec.choices} | prefix(' ') makes texts of whole numbers."
            )
        choices = tuple(texts)
    else:
        choices = tuple(_text(choice, row, what, where) for choice in spec.choices)
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise DataError(
            f"{where}: the {what} are {shown(list(choices))}; expected two or more, none of them empty. "
            "Mend the row or leave it out with 'keep'."
        )
    bare = [choice.strip() for choice in choices]
    if len(set(bare)) < len(bare):
        twice = next(choice for choice, count in Counter(bare).items() if count > 1)
        raise DataError(
            f"{where}: the {what} hold {shown(twice)} twice, so no score can tell the right one. Mend the row or leave "
            "it out with 'keep'."
        )
    return choices, _labels(labels, len(choices), spec, row, where)


def _labels(labels: Any, number: int, spec: TaskSpec, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if labels is None:
        return ()
    what = f"labels of task {spec.name}"
    given = as_list(evaluated(labels, row, what, where) if isinstance(labels, str) else labels)
    if given is None or len(given) != number or not all(is_text(label) for label in given):
        raise DataError(f"{where}: the {what} are {shown(given)}; expected a name for each of the {number} choices.")
    return tuple(str(label).strip() for label in given)


def _answer(
    spec: TaskSpec, row: Mapping[str, Any], choices: tuple[str, ...], labels: tuple[str, ...], where: str
) -> int | str | None:
    if spec.answer is None:
        return None
    what = f"answer of task {spec.name}"
    value = evaluated(spec.answer, row, what, where)
    what += _read_from("answer", spec.answer)
    if choices:
        return index_of(value, choices, labels, what, where)
    if value is None:
        raise DataError(f"{where}: the {what} is null. Leave such rows out with 'keep'.")
    return text_of(value, what, where)


def _completion(
    spec: TaskSpec,
    row: Mapping[str, Any],
    choices: tuple[str, ...],
    answer: int | str | None,
    last: Message | None,
    where: str,
) -> str:
    right = choices[answer] if choices and isinstance(answer, int) else None
    if spec.completion is None:
        if right is None and last is None:
            raise DataError(
                f"{where}: the conversation of task {spec.name} does not end with a turn of the assistant, "
                "and the task has no 'completion'; there is nothing to learn. End it with one, or write the template."
            )
        end = None if last is None else said(last)
        chosen = right if right is not None else f" {end}" if end else ""
        # a row that says its completion twice says the same thing, or two things
        for what, told in (("completion", _told(spec, row, where)), ("last turn", end)):
            if told is not None and told.strip() != chosen.strip():
                other = f"choice {answer}" if right is not None else "the last turn"
                raise DataError(_contradiction(spec, what, told, other, chosen, where, "Correct the one or the other."))
        return chosen
    completion = _text(spec.completion, row, f"completion of task {spec.name}", where)
    if right is not None and completion != right:
        advice = "Remove the 'completion' template: the right choice is the completion."
        raise DataError(_contradiction(spec, "completion", completion, f"choice {answer}", right, where, advice))
    return completion


def _rejected(spec: TaskSpec, row: Mapping[str, Any], where: str) -> str:
    """The worse completion."""
    what = f"rejected of task {spec.name}"
    text = _text(spec.rejected or "", row, what, where)
    if not text.strip():
        raise DataError(f"{where}: the {what} is empty. Leave such rows out with 'keep', e.g. keep: rejected | trim.")
    return text


def _told(spec: TaskSpec, row: Mapping[str, Any], where: str) -> str | None:
    """What a file's own column ``completion`` says where choices or a conversation decide what is learned."""
    value = row.get("completion")
    if not (spec.choices == "choices" or spec.messages in ("messages", "conversations")) or value == "":
        return None
    turns = as_list(value)
    if turns and all(isinstance(turn, Mapping) for turn in turns):
        return said(read_turns(turns, f"completion of task {spec.name}", where)[-1][0])
    return str(value) if is_text(value) else None


def _contradiction(spec: TaskSpec, what: str, told: str, other: str, right: str, where: str, advice: str) -> str:
    return (
        f"{where}: the {what} of task {spec.name} is {shown(told)} but {other} is {shown(right)}; they must be the "
        f"same text. {advice}"
    )


def _messages(spec: TaskSpec, row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    what = f"messages of task {spec.name}"
    if isinstance(spec.messages, str):
        turns: Any = evaluated(spec.messages, row, what, where)
        what += _read_from("messages", spec.messages)
    else:
        turns = [{"role": m.role, "content": _text(m.content, row, what, where)} for m in spec.messages or ()]
    return trained_part(read_turns(turns, what, where), spec.train_on, what, where)


def _check_reference(spec: TaskSpec, answer: int | str | None, where: str) -> None:
    """Refuse a reference that no answer could equal."""
    if not isinstance(answer, str):
        return
    if spec.score == "number" and whole_number(answer) is None:
        raise DataError(
            f"{where}: the answer of task {spec.name} is {shown(answer)}, but its score is number; expected a number "
            "and nothing else. Set score: exact, or take the number out with a template."
        )
    # a line end is the usual stop, and may be nobody's wish; any other one was written for this task
    stop = next((stop for stop in spec.stop if stop.isspace() and stop in answer.strip()), None)
    if spec.score == "exact" and stop is not None:
        raise DataError(
            f"{where}: the answer of task {spec.name} is {shown(answer)}, which holds the stop {stop!r}, so that even "
            "a right one would be cut before its end. Set another 'stop', or stop: []."
        )


def _check_text(texts: Mapping[str, str], spec: TaskSpec, where: str) -> None:
    """Refuse NUL, and halves of characters (``\\ud800``), which JSON can spell and no tokenizer can read."""
    for key, text in texts.items():
        if "\0" in text:
            found = "a NUL character, which is no text"
        elif half := _HALF.search(text):
            found = f"{half.group()!r}, half of a character, which is no Unicode text"
        else:
            continue
        raise DataError(
            f"{where}: the {key} of task {spec.name} holds {found}. Write the row again from its source, or leave it "
            "out with 'keep'."
        )
