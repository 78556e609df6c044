"""YAML in and out: recipes and task files, read strictly, written readably.

Three departures from PyYAML's defaults, each for a mistake that costs a run:
``1e-4`` is a number (YAML 1.1 reads a string), ``yes`` and ``no`` stay words (they are the labels of half the tasks),
and a key given twice in one mapping is refused (the first would be lost in silence).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from multiflora.errors import ConfigError

__all__ = ["dump_yaml", "parse_yaml", "read_yaml"]


# libyaml where PyYAML was built with it: the catalog of tasks is read on every `multiflora tasks`
_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Fast):
    """SafeLoader with the three departures above."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.append(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


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
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        told = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(
            f"{where}{line}: not valid YAML: {told}. Check the indentation, the colons and the quotes there."
        ) from error
    except yaml.YAMLError as error:  # characters YAML does not allow: no mark to point at
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}.") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file; a missing or undecodable file and bad YAML are ConfigErrors that name it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"the YAML files there: {', '.join(beside)}" if beside else "there is no YAML file there"
        raise ConfigError(f"{path} does not exist; {there}. Check the path.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); expected a YAML file.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check your rights to it.") from error
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
