"""Malformed data files of every format: refused in words, with the file and the place in it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of

from .conftest import World, fuzz
from .junk import changed, spoiled

EACH = {".jsonl": 300, ".json": 150, ".csv": 120, ".tsv": 60, ".parquet": 120}
ROWS: list[dict[str, Any]] = [
    {
        "id": f"row-{i}",
        "prompt": f"Is rose {i} red?",
        "choices": [" no", " yes"],
        "answer": i % 2,
        "completion": [" no", " yes"][i % 2],
    }
    for i in range(6)
]
PLAIN = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]


def as_lines(rows: Any) -> bytes:
    lines = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in lines).encode()


def as_table(delimiter: str) -> bytes:
    written = io.StringIO()
    table = csv.DictWriter(written, ["prompt", "completion"], delimiter=delimiter)
    table.writeheader()
    table.writerows(PLAIN)
    return written.getvalue().encode()


# what takes for ever where time goes by the square of a size
WIDE = [f"column{i}" for i in range(100_000)]
LARGE: dict[str, list[bytes]] = {
    ".jsonl": [
        as_lines([{**ROWS[0], **{name: i for i, name in enumerate(WIDE)}}] * 2),
        as_lines([{**row, "prompt": "a rose " * 100_000} for row in ROWS]),
        ("{" + '"prompt": "a", ' * 30_000 + '"completion": " b"}\n').encode(),
        as_lines([{**ROWS[0], "choices": [f" {i}" for i in range(20_000)]}] * 4),
        as_lines([{**ROWS[0], "prompt": f"row {i}"} for i in range(5_000)]),
    ],
    ".csv": [
        f"prompt,completion,{','.join(WIDE)}\n{'a,' * 100_001}b\n".encode(),
        f"prompt,completion,{','.join(WIDE)}\na,b\n".encode(),
        f"prompt,completion,{'a,' * 50_000}b\n{'a,' * 50_002}b\n".encode(),
        b"prompt,completion\n" + b'"a""b", c\n' * 5_000,
        b'prompt,completion\n"' + b"a rose\n" * 100_000 + b'", red\n',
    ],
}
LARGE |= {
    ".json": [b"[" + line.replace(b"\n", b",")[:-1] + b"]" for line in LARGE[".jsonl"]] + [b"[" * 100_000],
    ".tsv": [text.replace(b",", b"\t") for text in LARGE[".csv"]],
}


def as_parquet() -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), written)
    return written.getvalue()


@st.composite
def odd_parquet(draw: Any) -> bytes:
    """A whole Parquet file whose columns are of types that text files do not have, or packed into next to nothing."""
    rows = draw(st.sampled_from([0, 1, 5, 400]))
    columns = {"prompt": pa.array(["a rose"] * rows), "completion": pa.array([" red"] * rows)}
    kinds = {
        "zone": lambda: pa.array([0] * rows, pa.timestamp("s", tz=draw(st.sampled_from(["Nowhere/Land", "+99:99"])))),
        "far": lambda: pa.array([2**62] * rows, pa.timestamp("us")),
        "nested": lambda: pa.array([[[{"a": [1, None]}]]] * rows),
        "packed": lambda: pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["a"])),
        "bytes": lambda: pa.array([b"\xff\x00"] * rows),
        "wide": lambda: pa.array(["x" * 10_000] * rows),
        "nothing": lambda: pa.nulls(rows),
    }
    for name in draw(st.lists(st.sampled_from(["prompt", "completion", "id", "answer", "choices"]), min_size=1)):
        columns[name] = kinds[draw(st.sampled_from(sorted(kinds)))]()
    if draw(st.integers(0, 9)) == 0:
        packed = pa.DictionaryArray.from_arrays(pa.array(np.zeros(11_000_000, np.int8)), pa.array(["a"]))
        columns = {"prompt": packed, "completion": packed}
    written = io.BytesIO()
    pq.write_table(pa.table(columns), written)
    return written.getvalue()


def examples(suffix: str) -> st.SearchStrategy[bytes]:
    if suffix == ".parquet":
        return st.one_of(spoiled(as_parquet()), odd_parquet())
    large = st.sampled_from(LARGE[suffix])  # as they are: hypothesis keeps what it makes
    if suffix == ".jsonl":
        usual = st.one_of(changed([ROWS]).map(as_lines), spoiled(as_lines(ROWS)))
    elif suffix == ".json":
        usual = st.one_of(
            changed([ROWS]).map(lambda rows: json.dumps(rows).encode()), spoiled(json.dumps(ROWS).encode())
        )
    else:
        usual = spoiled(as_table("\t" if suffix == ".tsv" else ","))
    return st.integers(0, 20).flatmap(lambda n: usual if n else large)


@pytest.mark.parametrize("suffix", EACH)
def test_malformed_data_files(world: World, suffix: str) -> None:
    def read() -> None:
        task = {"name": "roses", "source": f"fuzzed{suffix}", "split_sizes": {"validation": 1, "test": 1}}
        examples_of(load_task(task), "train")

    fuzz(world, examples(suffix), EACH[suffix], Path(f"fuzzed{suffix}").write_bytes, read, tries=3)
