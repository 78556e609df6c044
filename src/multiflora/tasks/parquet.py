"""Rows of a Parquet file, read in the process that the system stops: a damaged one can keep pyarrow busy for minutes.

`sizes` and `rows_from` run in that process, see `multiflora.stoppable`; `multiflora.tasks.files` calls them there. The
file is read page by page, and a piece of it is given at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]  # comes with datasets
import pyarrow.parquet as pq  # type: ignore[import-untyped]

__all__ = ["rows_from", "sizes"]

BATCH = 256
"""Rows that are unpacked at a time."""
PIECE = 8 * 2**20
"""Bytes of rows that are given at a time, if there is more than one."""
BUFFER = 2**20
"""Bytes of a column that are read from the disk at a time."""

# a KeyError is a time zone that this machine does not know
_FAULTS = (pa.ArrowException, ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


def sizes(path: str) -> tuple[int, int]:
    """The number of rows and the bytes that they take unpacked, by what the file says of itself.

    Raises:
        ValueError: It is no Parquet file; the message follows the file's name.
    """
    with _file(path) as file:
        meta = file.metadata
        return meta.num_rows, sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))


def rows_from(path: str, start: int) -> list[dict[str, Any]]:
    """The next rows of a file, some of them; none behind the last one.

    Args:
        path: The file.
        start: How many rows are passed over; fast where the last call ended there.

    Raises:
        ValueError: They cannot be read; the message follows the file's name, and says which row was the last.
    """
    global _open
    name, number, pieces = _open
    if (name, number) != (path, start) or not start:
        pieces, number = _pieces(_file(path)), 0
    rows: list[dict[str, Any]] = []
    try:
        while number <= start:
            rows = next(pieces, [])
            number += len(rows)
            if not rows:
                break
    except MemoryError:
        raise
    except _FAULTS as error:
        raise ValueError(f", after row {number}: the Parquet file cannot be read: {_one_line(error)}") from error
    _open = (path, number, pieces)
    return rows[len(rows) - (number - start) :] if rows else []


_open: tuple[str, int, Iterator[list[dict[str, Any]]]] = ("", 0, iter(()))
"""The file that is being read, how many of its rows were given, and the rest."""


def _pieces(file: Any) -> Iterator[list[dict[str, Any]]]:
    with file:
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            size = min(BATCH, max(1, PIECE * group.num_rows // max(1, group.total_byte_size)))
            for batch in file.iter_batches(batch_size=size, row_groups=[i], use_threads=False):
                most = max(1, PIECE * len(batch) // max(1, batch.nbytes))  # packed, rows may have looked smaller
                for start in range(0, len(batch), most):
                    yield batch.slice(start, most).to_pylist()


def _file(path: str) -> Any:
    # threads and big pools reserve addresses, of which this process has few
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except MemoryError:
        raise
    except _FAULTS as error:
        raise ValueError(f" is not a Parquet file: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
