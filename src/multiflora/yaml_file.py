"""YAML in and out: recipes and task files, read strictly, written readably.

Three departures from PyYAML's defaults, each for a mistake that costs a run:
``1e-4`` is a number (YAML 1.1 reads a string), ``yes`` and ``no`` stay words (they are the labels of half the tasks),
and a key given twice in one mapping is refused (the first would be lost in silence).

YAML is data: no tag makes an object, and a file is measured before it is built. A kilobyte of aliases can stand for a
billion values, and a megabyte of brackets is deeper than Python's stack.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from multiflora.errors import ConfigError
from multiflora.suggest import shown

__all__ = ["LONGEST", "dump_yaml", "parse_yaml", "read_yaml"]

LONGEST = 4_000_000
"""Characters of the longest YAML text that is read."""
DEEPEST = 50
"""Mappings and lists within one another."""
MOST = 200_000
"""Values in one text, with every alias counted as what it stands for."""
LARGEST = 10**300
"""Whole numbers reach up to here, either way: Python writes longer ones with effort, or not at all."""


# libyaml where PyYAML was built with it: the catalog of tasks is read on every `multiflora tasks`
_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Fast):
    """SafeLoader with the three departures above."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(None, None, "expected a mapping here", node.start_mark)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *defaults`, which the base class unfolds
            key = self.construct_object(key_node, deep=True)
            try:
                is_twice = key in seen
                seen.add(key)
            except TypeError as error:
                raise yaml.MarkedYAMLError(None, None, "a list or a mapping is no key", key_node.start_mark) from error
            if is_twice:
                raise yaml.MarkedYAMLError(None, None, f"the key {shown(key)} is given twice", key_node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Turn what PyYAML lets through as Python's own errors (2026-99-99, !!int x) into errors with a place."""
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            written = str(getattr(node, "value", ""))[:40]
            raise yaml.MarkedYAMLError(
                None, None, f"{written!r} is no {node.tag.rpartition(':')[2]} ({error})", node.start_mark
            ) from error
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise yaml.MarkedYAMLError(None, None, "the number has more than 300 digits", node.start_mark)
        return value


_FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN)$"
)
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_KEPT = {
    letter: [(tag, rule) for tag, rule in rules if not tag.endswith((":float", ":bool"))]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _with_our_scalars(cls: Any) -> None:
    cls.yaml_implicit_resolvers = {letter: list(rules) for letter, rules in _KEPT.items()}
    cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    cls.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, so that a template reads as it was written."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_ODD_LINE_ENDS = set("\x85\u2028\u2029\ufeff")  # which the plain style would fold into a space


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if _ODD_LINE_ENDS & set(value) else None
    if (
        style is None and "\n" in value
    ):  # a block that opens or closes with an empty line is harder to read than its escapes
        style = "|" if value[0] not in "\n \t" and not value.endswith("\n\n") else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


# the same reading of scalars on both sides, so that what is written reads back equal
_with_our_scalars(_Loader)
_with_our_scalars(_Dumper)
_Dumper.add_representer(str, _text)


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document.

    Args:
        text: The YAML.
        where: Named in the error: a path, or the option the text came from.

    Raises:
        ConfigError: The text is not YAML, or gives a key twice; names the line.

    Example:
        >>> parse_yaml("{learning_rate: 1e-4, choices: [yes, no]}", "example")
        {'learning_rate': 0.0001, 'choices': ['yes', 'no']}
    """
    if len(text) > LONGEST:
        raise ConfigError(
            f"{where} is longer than {LONGEST:,} characters; expected a recipe or a task. Check the file."
        )
    try:
        _measure(text, where)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        told = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(
            f"{where}{line}: not valid YAML: {told}. Check the indentation, the colons and the quotes there."
        ) from error
    except (yaml.YAMLError, UnicodeEncodeError) as error:  # characters YAML does not allow: no mark to point at
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}.") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML fills what a tag made only later
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not valid YAML: a tag does not go with its value ({error}).") from error


def _measure(text: str, where: str) -> None:
    """Refuse what would be too deep or too large once built; looks at one event after the other and builds nothing."""
    sizes: list[tuple[str | None, int]] = [(None, 0)]  # of each collection that is open: its anchor, its values so far
    anchored: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=_Fast):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = sizes.pop()
            anchored[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            anchored[event.anchor] = size = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in sizes):
                raise ConfigError(f"{where}{_at(event)}: *{event.anchor} stands within itself; write it out.")
            size = anchored.get(event.anchor, 1)
        outer, before = sizes[-1]
        sizes[-1] = (outer, before + size)
        if len(sizes) > DEEPEST or sizes[-1][1] > MOST:
            raise ConfigError(
                f"{where}{_at(event)}: more than {DEEPEST} lists and mappings stand within one another, or values and "
                f"aliases come to more than {MOST:,}; no recipe or task needs that. Check the file."
            )


def _at(event: yaml.Event) -> str:
    return f", line {event.start_mark.line + 1}" if event.start_mark else ""


def read_yaml(path: Path) -> Any:
    """Read a YAML file; a missing or undecodable file and bad YAML are ConfigErrors that name it."""
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(LONGEST + 1)  # never more: a path may lead to /dev/zero
    except FileNotFoundError as error:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"the YAML files there: {', '.join(beside)}" if beside else "there is no YAML file there"
        raise ConfigError(f"{path} does not exist; {there}. Check the path.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); expected a YAML file.") from error
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shown(str(path))} cannot be read: {why}. Check the path and your rights to it.") from error
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """Write plain values (dicts, lists, text, numbers) as YAML, keys in the order given.

    Example:
        >>> print(dump_yaml({"b": 1e-4, "a": ["yes", " no"]}), end="")
        b: 0.0001
        a:
        - yes
        - ' no'
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
