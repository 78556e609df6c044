"""From a row of a data set to an Example: templates, choices, answer, each checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Undefined

from multiflora.errors import DataError
from multiflora.suggest import nearest
from multiflora.tasks.example import Example, Message
from multiflora.tasks.jinja import Failure, NullPrintedError, columns_of, expression, template
from multiflora.tasks.spec import TaskSpec

__all__ = ["evaluated", "keeps", "render"]

_ROLES = ("system", "user", "assistant")


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
        >>> render(spec, {"q": "1 + 2", "a": 3}, "row 0")
        Example(task='sums', id='row 0', prompt='1 + 2 =', completion=' 3', choices=(), answer=None, messages=())
    """
    row_id = str(evaluated(spec.id, row, f"id of task {spec.name}", where)) if spec.id else (id or where)
    choices = _choices(spec, row, where)
    answer = _answer(spec, row, choices, where)
    messages = _messages(spec, row, where) if spec.messages is not None else ()
    if messages and messages[-1].role == "assistant":
        messages, last = messages[:-1], " " + messages[-1].content.strip()
    else:
        last = None
    prompt = _plain(messages) if messages else _text(spec.prompt or "", row, f"prompt of task {spec.name}", where)
    completion = _completion(spec, row, choices, answer, last, where)
    if not prompt.strip():
        raise DataError(f"{where}: the prompt of task {spec.name} is empty. Leave such rows out with 'keep'.")
    if not completion.strip():
        raise DataError(
            f"{where}: the completion of task {spec.name} is empty; there is nothing to learn from it. "
            "Leave such rows out with 'keep', e.g. keep: output | trim."
        )
    turns = (*messages, Message("assistant", completion.strip())) if messages else ()
    _check_text((row_id, prompt, completion, *choices, str(answer), *(turn.content for turn in turns)), spec, where)
    return Example(spec.name, row_id, prompt, completion, choices, answer, turns)


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


def _choices(spec: TaskSpec, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    what = f"choices of task {spec.name}"
    if spec.choices is None:
        return ()
    if isinstance(spec.choices, str):
        value = evaluated(spec.choices, row, what, where)
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(c, str) for c in value):
            raise DataError(
                f"{where}: the {what} give {value!r}; expected a list of texts. The expression is {spec.choices!r}."
            )
        choices = tuple(value)
    else:
        choices = tuple(_text(choice, row, what, where) for choice in spec.choices)
    # two equal choices are a blemish of several published sets, not an error; an empty one would always win
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise DataError(
            f"{where}: the {what} are {list(choices)!r}; expected two or more, none of them empty. "
            "Mend the row or leave it out with 'keep'."
        )
    return choices


def _answer(spec: TaskSpec, row: Mapping[str, Any], choices: tuple[str, ...], where: str) -> int | str | None:
    if spec.answer is None:
        return None
    value = evaluated(spec.answer, row, f"answer of task {spec.name}", where)
    if not choices:
        if value is None:
            raise DataError(f"{where}: the answer of task {spec.name} is null. Leave such rows out with 'keep'.")
        return str(value)
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    text = str(int(value)) if whole else str(value)
    if not text.lstrip("-").isdigit() or not 0 <= int(text) < len(choices):
        raise DataError(
            f"{where}: the answer of task {spec.name} is {value!r}; expected the index of one of its choices, "
            f"0 to {len(choices) - 1}. An unlabelled row (often -1) is left out with 'keep', e.g. keep: label >= 0."
        )
    return int(text)


def _completion(
    spec: TaskSpec,
    row: Mapping[str, Any],
    choices: tuple[str, ...],
    answer: int | str | None,
    last: str | None,
    where: str,
) -> str:
    right = choices[answer] if choices and isinstance(answer, int) else None
    if spec.completion is None:
        completion = last if right is None else right
        if completion is None:
            raise DataError(
                f"{where}: the conversation of task {spec.name} does not end with a turn of the assistant, "
                "and the task has no 'completion'; there is nothing to learn. End it with one, or write the template."
            )
        return completion
    completion = _text(spec.completion, row, f"completion of task {spec.name}", where)
    if right is not None and completion != right:
        raise DataError(
            f"{where}: the completion of task {spec.name} is {completion!r} but choice {answer} is {right!r}; "
            "they must be the same text. Remove the 'completion' template: the right choice is the completion."
        )
    return completion


def _messages(spec: TaskSpec, row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    what = f"messages of task {spec.name}"
    if isinstance(spec.messages, str):
        turns = evaluated(spec.messages, row, what, where)
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise DataError(f"{where}: the {what} give {turns!r}; expected a list of turns with 'role' and 'content'.")
        found = []
        for turn in turns:
            if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
                raise DataError(f"{where}: the {what} hold the turn {turn!r}; expected 'role' and 'content'.")
            found.append(Message(str(turn["role"]), str(turn["content"] or "")))
    else:
        found = [Message(m.role, _text(m.content, row, what, where)) for m in spec.messages or ()]
    for role, _ in found:
        if role not in _ROLES:
            raise DataError(f"{where}: the {what} have the role {role!r}; expected one of {', '.join(_ROLES)}.")
    if not found or found[0].role == "assistant":
        raise DataError(
            f"{where}: the {what} are {'empty' if not found else 'opened by the assistant'}; expected a user first."
        )
    return tuple(found)


def _check_text(texts: Iterable[str], spec: TaskSpec, where: str) -> None:
    """Refuse halves of characters (``\\ud800``), which JSON can spell and no tokenizer can read."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a text of task {spec.name} holds {error.object[error.start]!r}, half of a character, which is "
            "no Unicode text. Write the row again from its source, or leave it out with 'keep'."
        ) from error


def _plain(messages: Sequence[Message]) -> str:
    """Write a conversation without a chat template, for models that have none."""
    return "\n".join(f"{role.capitalize()}: {content.strip()}" for role, content in messages) + "\nAssistant:"
