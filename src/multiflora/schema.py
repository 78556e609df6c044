"""The base of everything a user writes in YAML, and the telling of what is wrong with it.

Pydantic finds the problems, all of them; this file says each one in our words: the key's path, the value, what was
expected, and the nearest known name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from multiflora.errors import ConfigError
from multiflora.files import expanded
from multiflora.suggest import did_you_mean, shown

_TOLD = 30  # problems of one file; whoever has more has another kind of file

__all__ = ["Strict", "absolute", "build", "expanded", "problems", "refusal"]

M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    """A frozen model that refuses unknown keys; the docstring under a field is its description everywhere."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def build(model: type[M], value: Any, *, where: str, base: Path) -> M:
    """Validate ``value`` as ``model``.

    Args:
        model: What to build.
        value: The mapping as the user wrote it.
        where: Named first in the error, e.g. the file.
        base: Folder that relative paths in ``value`` are relative to.

    Raises:
        ConfigError: Lists every problem, each with the path of its key.
    """
    try:
        return model.model_validate(value, context={"base": base})
    except ValidationError as error:
        raise refusal(problems(error, model), where) from error


def absolute(path: str | Path, info: ValidationInfo) -> Path:
    """Make a path written by the user absolute; symlinks stay as they are, so that it still reads as written.

    Raises:
        ValueError: No path can be so.
    """
    base = (info.context or {}).get("base") or Path.cwd()
    return Path(*_without_dots(Path(base).absolute() / expanded(path)))


def _without_dots(path: Path) -> Iterator[str]:
    kept: list[str] = []
    for part in path.parts:
        if part == ".." and len(kept) > 1:
            kept.pop()
        elif part != "..":
            kept.append(part)
    yield from kept


def refusal(found: Sequence[str], where: str) -> ConfigError:
    """Put all problems into one error."""
    if len(found) == 1:
        return ConfigError(f"{where}: {found[0]}")
    listed = "\n".join(f"  - {problem}" for problem in found[:_TOLD])
    if len(found) > _TOLD:
        listed += f"\n  - and {len(found) - _TOLD} more."
    return ConfigError(f"{where} has {len(found)} problems:\n{listed}")


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Say each of pydantic's findings in one sentence or two; ``model`` is the model that was validated."""
    found = error.errors(include_url=False)
    told: dict[str, list[ErrorDetails]] = {}
    for item in found:
        told.setdefault(_path(item["loc"]), []).append(item)
    # where something within a value is wrong, the value itself is not of the wrong type or length as well
    outer = {path[: dot.start()] for path in told for dot in _DOT.finditer(path[:1000])}
    inner = [path for path in told if path not in outer]
    # what is only counted is not put into words: each takes a search for the nearest name
    return [_sentence(told[path], path, model) if i < _TOLD else path for i, path in enumerate(inner)]


_DOT = re.compile(r"\.")


def _sentence(same_place: Sequence[ErrorDetails], path: str, model: type[BaseModel]) -> str:
    found = same_place[0]
    kind, loc, value, ctx = found["type"], found["loc"], found["input"], found.get("ctx", {})
    owners = _owners(path, model)
    if "hub" in loc or "generator" in loc:  # the kind of source is clear, so only its keys are meant
        owners = [owner for owner in owners if getattr(owner, "kind", None) in loc] or owners
    if kind == "extra_forbidden":
        names = sorted({name for owner in owners for name in owner.model_fields})
        return f"{path} is not a known key; {did_you_mean(str(loc[-1]), names)}"
    if kind == "missing":
        return f"{path} is missing; it is required. {_description(path, owners)}".rstrip()
    if kind == "value_error":  # raised by one of our validators, which speaks for itself
        return f"{path}: {ctx['error']}" if path else str(ctx["error"])
    if kind == "literal_error" and len(same_place) == 1:
        options = ctx["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{path} is {shown(value)}; {did_you_mean(str(value), options)}"
    expected = " or ".join(dict.fromkeys(_expected(f) for f in same_place))
    return f"{path or 'the whole'} is {shown(value)}; expected {expected}. {_description(path, owners)}".rstrip()


_WORDS = {
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "path_type": "a path",
    "invalid_key": "a word for a key",
    "string_pattern_mismatch": "letters, digits, and _ - . after the first",
}


def _expected(found: ErrorDetails) -> str:
    if found["type"] == "too_short":
        return f"at least {found['ctx']['min_length']} of them"
    return _WORDS.get(found["type"], found["msg"].removeprefix("Input should be "))


# pydantic puts the member of a union that it tried into the place; the user never wrote that
_MEMBER = re.compile(r"^(str|int|float|bool|(tuple|list|dict|literal)\[.*)$")


def _path(loc: Sequence[str | int]) -> str:
    """Return the key path as the user would write it: ``tasks.0.source.path``."""
    written: list[str] = []
    for i, part in enumerate(loc):
        member = i > 0 and (loc[i - 1] == "source" or part == "[key]" or _MEMBER.match(str(part)))
        if not member:
            written.append(str(part))
    return ".".join(written)


def _owners(path: str, model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models that the last key of the path could belong to."""
    owners = [model]
    for part in path.split(".")[:-1]:
        fields = [owner.model_fields[part] for owner in owners if part in owner.model_fields]
        owners = [inner for field in fields for inner in _models(field.annotation)] or owners
    return owners


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _description(path: str, owners: Sequence[type[BaseModel]]) -> str:
    for owner in owners:
        field = owner.model_fields.get(path.rpartition(".")[2])
        if field is not None and field.description:
            return f"({field.description.splitlines()[0]})"
    return ""


def as_mapping(value: Any, key: str) -> Mapping[str, Any]:
    """Let the short spelling ``model: some/id`` stand for ``model: {name: some/id}``."""
    return {key: value} if isinstance(value, str) else value
