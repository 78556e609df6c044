"""All that a comparison's analysis is made of, in one small file: anyone can redo it, without a model or the data.

``cells.json.gz`` holds the comparison, what each method costs, how it was tuned, which looks were taken, and of every
training its scores row by row. It is gzipped JSON; ids of rows are written once, and nats with seven digits.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from multiflora.comparison.paired import Cell
from multiflora.comparison.plan import Competitor
from multiflora.comparison.results import Summary
from multiflora.comparison.spec import Comparison, load_comparison
from multiflora.comparison.summary import summarise
from multiflora.comparison.tuning import Tuning
from multiflora.errors import ConfigError
from multiflora.files import write_bytes
from multiflora.yaml_file import parse_yaml

__all__ = ["CELLS", "analyse", "read_archive", "write_archive"]

CELLS = "cells.json.gz"
"""File of a comparison: every finished training's scores, row by row."""

_FORMAT = 1
_LEFT_OUT = ("versions",)  # what the analysis does not read


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """What the file holds, beside the cells."""

    format: int
    comparison: str
    """YAML."""
    planned: list[Competitor]
    tunings: dict[str, Tuning]
    looks: list[dict[str, Any]]
    ids: list[list[Any]]
    """Lists of rows' ids, which the cells name by number."""
    cells: list[dict[str, Any]]


def write_archive(
    path: Path,
    comparison: Comparison,
    planned: Sequence[Competitor],
    cells: Sequence[Cell],
    tunings: Mapping[str, Tuning],
    taken: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write what `summarise` is given; the same input makes the same bytes.

    Args:
        path: The file.
        comparison: The comparison.
        planned: Its competitors.
        cells: The finished cells, the untrained model's among them.
        tunings: Label -> whether its learning rate is tuned.
        taken: The looks that were taken before this one.
    """
    ids: list[list[Any]] = []
    packed = [_packed(cell, ids) for cell in cells]
    found = _Archive(
        format=_FORMAT,
        comparison=comparison.to_yaml(comparison.recipe.output),
        planned=list(planned),
        tunings=dict(tunings),
        looks=[dict(look) for look in taken],
        ids=ids,
        cells=packed,
    )
    text = json.dumps(TypeAdapter(_Archive).dump_python(found, mode="json"), separators=(",", ":"), sort_keys=True)
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def read_archive(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Comparison, list[Competitor], list[dict[str, Any]], dict[str, Tuning], list[dict[str, Any]]]:
    """Read what `summarise` is given: comparison, competitors, cells, tunings and looks.

    Args:
        path: A file that `write_archive` wrote.
        overrides: ``key.path=value`` items for the comparison; those that only the analysis reads make sense here.

    Raises:
        ConfigError: It is no such file.
    """
    path = Path(path).expanduser()
    try:
        found = TypeAdapter(_Archive).validate_json(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} is no file of a comparison's cells ({reason}); expected the {CELLS} that multiflora compare "
            "writes into its output folder."
        ) from error
    if found.format != _FORMAT:
        raise ConfigError(f"{path} has format {found.format}, and this version reads {_FORMAT}; update multiflora.")
    comparison = load_comparison(parse_yaml(found.comparison, str(path)), overrides)
    return comparison, found.planned, [_unpacked(cell, found.ids) for cell in found.cells], found.tunings, found.looks


def analyse(path: str | Path, overrides: Sequence[str] = ()) -> Summary:
    """Redo a comparison's whole analysis from its cells; nothing is trained or loaded.

    Args:
        path: A comparison's ``cells.json.gz``.
        overrides: ``key.path=value`` items, e.g. ``compare.margin=1.0``.

    Raises:
        ConfigError: It is no such file.

    Example:
        >>> analyse("runs/compared/cells.json.gz").answer  # doctest: +SKIP
        'rlora did better than lora.'
    """
    return summarise(*read_archive(path, overrides))


def _packed(cell: Cell, ids: list[list[Any]]) -> dict[str, Any]:
    """A cell with the number of its list of ids in place of the list."""
    rows = {}
    for task, own in cell["rows"].items():
        if own["id"] not in ids:
            ids.append(list(own["id"]))
        rows[task] = {
            "id": ids.index(own["id"]),
            "score": [_short(value) for value in own["score"]],
            "nll": [_short(value) for value in own["nll"]],
        }
    return {key: value for key, value in cell.items() if key not in _LEFT_OUT} | {"rows": rows}


def _unpacked(cell: dict[str, Any], ids: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return cell | {"rows": {task: {**own, "id": list(ids[own["id"]])} for task, own in cell["rows"].items()}}


def _short(value: float | None) -> float | int | None:
    """Seven digits, and whole numbers without a point."""
    if value is None:
        return None
    short = float(f"{value:.7g}")
    return int(short) if short.is_integer() else short
