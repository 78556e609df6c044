"""Rows of JSONL, JSON, CSV, TSV and Parquet files, each with its place for error messages."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from glob import has_magic
from pathlib import Path
from typing import Any

from multiflora.errors import DataError
from multiflora.machine import memory_available, size_words
from multiflora.stoppable import StoppedError, run, uncollected
from multiflora.suggest import listed, shown
from multiflora.tasks.spec import SPLITS, FilesSource, Split

__all__ = ["LONGEST_LINE", "SUFFIXES", "Row", "check_size", "read_rows", "split_files"]

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (``train.jsonl, line 7``) and its columns."""

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

LONGEST_LINE = 64 * 2**20
"""Characters of the longest line; a file without line ends is not read into memory to find that out."""
MOST_VALUES = 500_000
"""Values within one row: each is an object in memory, which goes to a template and back."""
MOST_FILES = 10_000
"""Files that one pattern may match."""
MOST_ROWS = 2_000_000
"""Rows of one file: each is a mapping in memory."""
ROW_BYTES = 400
"""The least that a row takes in memory: the mapping, its place and a short value."""


def split_files(source: FilesSource) -> dict[Split, tuple[Path, ...]]:
    """Find the files of every split the source has, globs resolved, in sorted order.

    Raises:
        DataError: A named file or folder does not exist, or a folder holds no split.
    """
    if source.folder is not None:
        return _folder_files(source.folder)
    named: dict[Split, tuple[Path, ...]] = {s: getattr(source, s) for s in SPLITS}
    return {split: _existing(paths) for split, paths in named.items() if paths}


def _folder_files(folder: Path) -> dict[Split, tuple[Path, ...]]:
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} {_why_missing(folder, 'folder')} A hub data set is written source: {{path: owner/name}}."
        )
    found: dict[Split, tuple[Path, ...]] = {}
    for split in SPLITS:
        files = [folder / f"{split}{suffix}" for suffix in SUFFIXES if os.path.isfile(folder / f"{split}{suffix}")]
        if len(files) > 1:
            both = " and ".join(f.name for f in files)
            raise DataError(f"{folder} has {both}; expected one file for the split {split}. Remove the others.")
        if files:
            found[split] = tuple(files)
    if not found:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise DataError(
            f"{folder} holds no train, validation or test file ({', '.join(SUFFIXES)}); it holds {there}. "
            "Name the files with 'train:', 'validation:' and 'test:'."
        )
    return found


def _existing(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    files: list[Path] = []
    for path in paths:
        if os.path.isfile(path):
            files.append(path)
        elif has_magic(str(path)):
            matched = _matching(path)
            if not matched:
                raise DataError(f"{path} matches no file. Check the pattern and the folder it starts from.")
            files.extend(matched)
        else:
            raise DataError(f"{path} {_why_missing(path, 'file')}")
    return tuple(dict.fromkeys(files))


def _matching(path: Path) -> list[Path]:
    """Files that a pattern matches; ``/**`` could go through all that the machine has."""
    try:
        found = run("multiflora.files:matching", str(path))
    except StoppedError as error:
        raise DataError(
            f"{path}: {error} to look through the folders that this pattern names. Name a folder further down, or the "
            "files."
        ) from error
    if len(found) > MOST_FILES:
        raise DataError(f"{path} matches {len(found):,} files; expected at most {MOST_FILES:,}. Put rows together.")
    return sorted(map(Path, found))


def _why_missing(path: Path, what: str) -> str:
    if os.path.exists(path):
        return f"is not a {what}; expected one."
    if not os.path.isdir(path.parent):
        return f"does not exist, nor does its folder {path.parent}. Relative paths are relative to the recipe file."
    there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:12]) or "nothing"
    return f"does not exist; {path.parent} holds {there}."


def check_size(paths: Iterable[Path]) -> None:
    """Refuse files that cannot fit into memory, before they are read.

    Raises:
        DataError: Their rows need more than the machine has.
    """
    files = list(paths)
    needed, there = sum(_size(path) for path in files), memory_available()
    if needed > there:
        named = ", ".join(path.name for path in files[:3]) + (" and more" if len(files) > 3 else "")
        raise DataError(
            f"{named} in {files[0].parent}: the rows need at least {size_words(needed)}, and {size_words(there)} of "
            "memory are free. Take fewer rows, or a machine with more memory."
        )


def _size(path: Path) -> int:
    """Bytes of a file, unpacked."""
    try:
        if path.suffix != ".parquet":
            return path.stat().st_size
        number, size = _parquet_sizes(path)
        return max(size, number * ROW_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path and your rights to it.") from error


def _parquet_sizes(path: Path) -> tuple[int, int]:
    """Rows of a Parquet file and the bytes that they take unpacked; equal ones are packed into next to nothing.

    Raises:
        DataError: There are more than are held in memory.
    """
    number, size = _stoppable(path, "sizes")
    if number > MOST_ROWS:
        raise DataError(_too_many(path))
    return number, size


def read_rows(path: Path) -> Iterator[Row]:
    """Read one file row by row, told apart by its suffix.

    Raises:
        DataError: An unknown suffix, text that is not UTF-8, or a malformed row (file and line number).
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}.")
    try:
        for number, row in enumerate(readers[path.suffix](path)):
            if number >= MOST_ROWS:
                raise DataError(_too_many(path))
            yield row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{path} cannot be read: {why}. Check the path and your rights to it.") from error


def _too_many(path: Path) -> str:
    return f"{path} has more than {MOST_ROWS:,} rows, which are all held in memory. Take a part of them."


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, none of which may fill the memory."""
    with path.open(encoding="utf-8-sig", newline=newline) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}, line {number} has more than {LONGEST_LINE:,} characters; expected one row on every line. "
                    "Check that the file is what its name says."
                )
            yield line


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if sum(map(line.count, ",[{")) > MOST_VALUES:  # more values than these it cannot hold
            raise DataError(_too_full(where))
        try:
            row = _parsed(line)
        except json.JSONDecodeError as error:
            shown = line.strip() if len(line) < 80 else f"{line.strip()[:77]}..."
            raise DataError(
                f"{where}: not valid JSON: {error.msg} at column {error.colno}: {shown} "
                "Expected one JSON object on every line."
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(_beyond(where, error)) from error
        yield where, _object(row, where)


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = _parsed(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " One object a line is JSONL: name the file .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.{hint}") from error
    except UnicodeDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise DataError(_beyond(str(path), error)) from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}; expected a list of objects.")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, item {number}"
        if _holds_more_than(MOST_VALUES, row):
            raise DataError(_too_full(where))
        yield where, _object(row, where)


def _parsed(text: str) -> Any:
    with uncollected():
        return json.loads(text, object_pairs_hook=_once_each)


class _TwiceError(ValueError):
    """A key stands twice in an object."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python would let the last of two values of a key win, and lose the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


def _beyond(where: str, error: Exception) -> str:
    """JSON that is valid and that is not read all the same."""
    if isinstance(error, _TwiceError):
        return f"{where}: the key {shown(str(error))} stands twice in one object; expected each once. Take one out."
    if isinstance(error, RecursionError):
        return f"{where}: lists and objects stand too deep within one another. Expected a flat object of columns."
    return f"{where}: a number has too many digits for Python to read ({error}). Write it as text."


def _holds_more_than(most: int, value: Any) -> bool:
    """Whether there are more values within one than that; looks at no more of them."""
    count, left = 0, [value]
    while left:
        value = left.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        if count > most:
            return True
        left.extend(inner)
    return False


def _too_full(where: str) -> str:
    return (
        f"{where} holds more than {MOST_VALUES:,} values, or as many commas and brackets; expected one row, which is a "
        "few texts and numbers. Check that the file is what its name says."
    )


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f'{where} is a {type(row).__name__}; expected an object, e.g. {{"prompt": ..., "completion": ...}}.'
        )
    return row


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(_lines(path, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        names = list(reader.fieldnames or ())
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:  # of two columns of one name, only the last would be read
            raise DataError(
                f"{path}: the header names the column {shown(twice)} twice; expected each once. Rename one."
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            # csv marks a long row by the key None and a short one by the value None
            if None in row or None in row.values():
                raise DataError(
                    f"{where} does not have the {len(names)} values of the header "
                    f"({listed(names)}). Put values with separators or line ends in quotes."
                )
            yield where, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error


def _parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, from the process that the system stops, see `multiflora.tasks.parquet`."""
    _parquet_sizes(path)
    number = 0
    while rows := _stoppable(path, "rows_from", number):
        for row in rows:
            number += 1
            yield f"{path}, row {number}", row


def _stoppable(path: Path, function: str, *arguments: int) -> Any:
    try:
        return run(f"multiflora.tasks.parquet:{function}", str(path.absolute()), *arguments)
    except StoppedError as error:
        after = f", after row {arguments[0]:,}" if arguments else ""
        raise DataError(
            f"{path}{after}: {error} to read the next rows of this Parquet file. It is damaged, or its rows or pages "
            "are very large: write it again with smaller pages, or as JSONL."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}{error}") from error
