"""Raw rows of every split a source has: from the hub, from files, from a generator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiflora.errors import DataError
from multiflora.tasks.files import check_size, read_rows, split_files
from multiflora.tasks.generator import generator_rows, split_range
from multiflora.tasks.spec import SPLITS, FilesSource, GeneratorSource, HubSource, Split, TaskSpec

__all__ = ["Row", "read_source", "splits_there"]


@dataclass(frozen=True)
class Row:
    """One raw row."""

    name: str
    """Split and number, e.g. ``train-17``: stable, as the number is the row's place in the source."""
    where: str
    """The place a message names."""
    columns: Mapping[str, Any]
    """Column -> value."""


def splits_there(spec: TaskSpec) -> list[Split]:
    """Splits that the source has, in the order of SPLITS."""
    source = spec.source
    if isinstance(source, FilesSource):
        found = set(split_files(source))
    elif isinstance(source, GeneratorSource):
        found = {split for split, rows in source.sizes.items() if rows}
    else:
        found = set(source.splits)
    return [split for split in SPLITS if split in found]


def read_source(spec: TaskSpec, splits: Sequence[Split]) -> dict[Split, list[Row]]:
    """Read the rows of some splits that the source has.

    Raises:
        DataError: Something cannot be read; says what, and where.
    """
    source = spec.source
    if isinstance(source, FilesSource):
        files = split_files(source)
        check_size(path for split in splits for path in files[split])
        return {split: _from_files(files[split], split) for split in splits}
    if isinstance(source, GeneratorSource):
        return {split: _from_generator(source, split) for split in splits}
    return {split: _from_hub(source, split, spec.name) for split in splits}


def _from_files(paths: Sequence[Path], split: Split) -> list[Row]:
    rows = [row for path in paths for row in read_rows(path)]
    if not rows:
        named = ", ".join(str(path) for path in paths)
        raise DataError(f"{named}: no rows, so the {split} split is empty. Check the file.")
    return [Row(f"{split}-{i}", where, columns) for i, (where, columns) in enumerate(rows)]


def _from_generator(source: GeneratorSource, split: Split) -> list[Row]:
    rows, place = generator_rows(source), f"{source.generator} (seed {source.seed}), row"
    made: list[Row] = []
    try:
        for i in split_range(source, split):
            made.append(Row(f"{split}-{i}", f"{place} {i}", rows[i]))
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(
            f"{place} {len(made)} of the {split} split cannot be made with the settings {source.settings}: "
            f"{' '.join(str(error).split())[:200]}. Correct the settings, or leave them out."
        ) from error
    return made


def _from_hub(source: HubSource, split: Split, task: str) -> list[Row]:
    found: list[Row] = []
    for name in source.name or (None,):
        label = f"{name}-" if len(source.name) > 1 else ""
        place = f"{source.path}{f' ({name})' if name else ''}, {source.splits[split]} row"
        data = _load_hub(source, name, source.splits[split], task)
        found += [Row(f"{split}-{label}{i}", f"{place} {i}", columns) for i, columns in enumerate(data)]
    return found


def _load_hub(source: HubSource, name: str | None, hub_split: str, task: str) -> Iterable[Mapping[str, Any]]:
    import datasets  # here: reading a recipe does not need it

    files = {split: list(paths) for split, paths in source.data_files.items()} or None
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            source.path, name, split=hub_split, data_files=files, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        told = " ".join(str(error).split())[:300]
        raise DataError(
            f"task {task}: the data set {source.path} (configuration {name or 'default'}, split {hub_split}) "
            f"cannot be loaded: {told} Check the names and the network (and HF_HUB_OFFLINE), or download the "
            "data and name the files as the task's source."
        ) from error
    return rows
