"""Regular expressions that come out of a file: tried on the names they are for, where the system can stop the search.

Python's matcher tries every way to split a text between repeats that could all take it; ``(a+)+$`` needs 2^n steps for
n letters. Whether that does harm depends on the names: few modules are called ``aaaaaaaaaa``. So a pattern is not
judged by its looks. Before peft runs it over the names of a model's modules, the same search is done in a process that
the system stops, see `multiflora.stoppable`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from multiflora.stoppable import StoppedError, restart_clock, run
from multiflora.suggest import shown

__all__ = ["pattern_problems", "why_refused"]

LONGEST = 20_000
"""Characters of the longest pattern: peft writes all layers' names into one."""
MOST = 5_000
"""Patterns of one setting: peft matches each with the name of every module."""
AHEAD = 256
"""Patterns that are tried in one call."""
# how peft looks for each of them in a module's name; those of a list are names and no patterns
_SEARCHES = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "heads_pattern": r"(.*\.)?({})$",
}


def why_refused(pattern: str, names: Iterable[str] = ()) -> str:
    """Say why a pattern is not used; empty where it is.

    Args:
        pattern: The regular expression.
        names: What it will be matched with; none: only whether it is one is looked at.

    Example:
        >>> why_refused(r"model\\.layers\\.\\d+\\.(q|v)_proj", ["model.layers.0.q_proj"])
        ''
        >>> why_refused("(a+)+$", ["a" * 50 + "b"])
        'it takes more than 2 seconds'
    """
    if len(pattern) > LONGEST:
        return f"it has {len(pattern):,} characters; expected at most {LONGEST:,}"
    try:
        run("multiflora.patterns:searched", pattern, list(names))
    except StoppedError as error:
        return str(error)
    except ValueError as error:
        return f"it is not a regular expression ({error})"
    return ""


def searched(pattern: str, names: list[str]) -> None:
    """Match a pattern with every name, in the process that can be stopped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    for name in names:
        compiled.match(name)
        compiled.fullmatch(name)


def all_searched(patterns: list[str], names: list[str]) -> bool:
    """Whether all patterns are ones, and can be matched with every name; see `searched`."""
    for pattern in patterns:
        restart_clock()
        try:
            searched(pattern, names)
        except ValueError:
            return False
    return True


def _are_fine(patterns: list[str], names: list[str]) -> bool:
    """Try many patterns in one call, which takes longer than most searches; False where one has to be looked for."""
    if any(len(pattern) > LONGEST for pattern in patterns):
        return False
    try:
        return bool(run("multiflora.patterns:all_searched", patterns, names))
    except StoppedError:
        return False


def pattern_problems(settings: Mapping[str, Any], names: Iterable[str] = ()) -> Iterator[str]:
    """Say which patterns in an adapter's settings are not used, a sentence each.

    Args:
        settings: The settings by name.
        names: The modules that they will be matched with, where those are known.
    """
    known = list(names)
    for key, search in _SEARCHES.items():
        given = settings.get(key)
        if key in ("target_modules", "exclude_modules"):  # a list holds plain names
            given = given if isinstance(given, str) else None
        every = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple | dict) else []
        texts = list(dict.fromkeys(pattern for pattern in every if isinstance(pattern, str)))
        for pattern in (pattern for pattern in every if not isinstance(pattern, str)):
            yield f"{key} holds {shown(pattern)}: it is no text."
        if len(texts) > MOST:
            yield f"{key} holds {len(texts):,} patterns; expected at most {MOST:,}."
            continue
        for start in range(0, len(texts), AHEAD):
            chunk = texts[start : start + AHEAD]
            if _are_fine(chunk, []) and (not known or _are_fine([search.format(text) for text in chunk], known)):
                continue
            for pattern in chunk:
                why = why_refused(pattern) or (known and why_refused(search.format(pattern), known))
                if why:
                    yield f"{key} holds {shown(pattern)}: {why}."
