import json
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from multiflora.errors import DataError
from multiflora.stoppable import run
from multiflora.tasks import FilesSource
from multiflora.tasks.files import check_size, read_rows, split_files

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y, z"}]


def columns(path):
    return [row for _, row in read_rows(path)]


def test_every_format_gives_its_rows(tmp_path):
    (tmp_path / "r.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in ROWS), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(ROWS))
    (tmp_path / "r.csv").write_text('a,b\n1,x\n2,"y, z"\n')
    (tmp_path / "r.tsv").write_text("a\tb\n1\tx\n2\ty, z\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    as_text = [{"a": str(r["a"]), "b": r["b"]} for r in ROWS]
    assert columns(tmp_path / "r.jsonl") == columns(tmp_path / "r.json") == columns(tmp_path / "r.parquet") == ROWS
    assert columns(tmp_path / "r.csv") == columns(tmp_path / "r.tsv") == as_text


def test_a_malformed_jsonl_line_is_named_by_file_and_number(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(
        DataError, match=r'r\.jsonl, line 3: not valid JSON: .* at column \d+: \{"a": 2 Expected one JSON'
    ):
        columns(tmp_path / "r.jsonl")


def test_a_line_that_is_no_object_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"r\.jsonl, line 2 is a list; expected an object"):
        columns(tmp_path / "r.jsonl")


def test_jsonl_in_a_json_file_is_recognised(tmp_path):
    (tmp_path / "r.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"r\.json, line 2: .*name the file \.jsonl"):
        columns(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"data": []}')
    with pytest.raises(DataError, match=r"r\.json holds a dict; expected a list"):
        columns(tmp_path / "r.json")


@pytest.mark.parametrize("line", ["2", "2,y,z"])
def test_a_csv_row_of_another_length_is_named(tmp_path, line):
    (tmp_path / "r.csv").write_text(f"a,b\n1,x\n{line}\n")
    with pytest.raises(DataError, match=r"r\.csv, line 3 does not have the 2 values of the header \(a, b\)"):
        columns(tmp_path / "r.csv")


def test_what_is_no_data_file_is_refused(tmp_path):
    (tmp_path / "r.parquet").write_text("text")
    with pytest.raises(DataError, match=r"r\.parquet is not a Parquet file"):
        columns(tmp_path / "r.parquet")
    (tmp_path / "r.txt").write_text("text")
    with pytest.raises(DataError, match=r"r\.txt ends in '\.txt'; expected one of \.jsonl"):
        columns(tmp_path / "r.txt")
    (tmp_path / "r.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl is not UTF-8 text"):
        columns(tmp_path / "r.jsonl")


def test_a_folder_gives_the_splits_it_has(tmp_path):
    for name in ("train.jsonl", "test.csv", "notes.txt"):
        (tmp_path / name).touch()
    found = split_files(FilesSource(folder=tmp_path))
    assert found == {"train": (tmp_path / "train.jsonl",), "test": (tmp_path / "test.csv",)}
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match=r"has train\.jsonl and train\.csv; expected one file for the split train"):
        split_files(FilesSource(folder=tmp_path))


def test_a_folder_without_splits_says_what_it_holds(tmp_path):
    (tmp_path / "part1.jsonl").touch()
    with pytest.raises(DataError, match=r"holds no train, validation or test file .* it holds part1\.jsonl"):
        split_files(FilesSource(folder=tmp_path))


def test_globs_are_sorted_and_must_match(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    source = FilesSource(train=[tmp_path / "*.jsonl", tmp_path / "a.jsonl"])
    assert split_files(source) == {"train": (tmp_path / "a.jsonl", tmp_path / "b.jsonl")}
    with pytest.raises(DataError, match=r"\*\.csv matches no file"):
        split_files(FilesSource(train=tmp_path / "*.csv"))


def test_a_missing_file_says_what_lies_there(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist; .* holds train\.jsonl"):
        split_files(FilesSource(train=tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"nor does its folder .*Relative paths are relative to the recipe"):
        split_files(FilesSource(train=tmp_path / "no" / "train.jsonl"))
    with pytest.raises(DataError, match="is not a folder; expected one"):
        split_files(FilesSource(folder=tmp_path / "train.jsonl"))


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.tsv"])
def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr("multiflora.tasks.files.LONGEST_LINE", 1000)
    (tmp_path / name).write_text('{"a": 1}\n' + "x" * 3000)
    with pytest.raises(DataError, match=rf"{name}, line \d has more than 1,000 characters; expected one row"):
        columns(tmp_path / name)


def test_a_row_of_very_many_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("multiflora.tasks.files.MOST_VALUES", 1000)
    row = '{"a": [' + "[1], " * 600 + "1]}"
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n' + row)
    with pytest.raises(DataError, match=r"r\.jsonl, line 2 holds more than 1,000 values.*expected one row"):
        columns(tmp_path / "r.jsonl")
    (tmp_path / "r.json").write_text('[{"a": {"b": [1]}}, ' + row + "]")
    with pytest.raises(DataError, match=r"r\.json, item 2 holds more than 1,000 values"):
        columns(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"a": ' + "[" * 100_000, "stand too deep within one another"),
        ('{"a": ' + "9" * 5000 + "}", "a number has too many digits for Python"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice in one object"),
    ],
)
def test_json_that_python_does_not_read_is_said(tmp_path, row, message):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n' + row + "\n")
    with pytest.raises(DataError, match=rf"r\.jsonl, line 2: .*{message}"):
        columns(tmp_path / "r.jsonl")
    (tmp_path / "r.json").write_text(f"[{row}]")
    with pytest.raises(DataError, match=rf"r\.json: .*{message}"):
        columns(tmp_path / "r.json")


def test_a_column_of_which_one_value_would_be_lost_is_refused(tmp_path):
    (tmp_path / "r.csv").write_text("prompt,answer,prompt\na,b,c\n")
    with pytest.raises(DataError, match=r"r\.csv: the header names the column 'prompt' twice"):
        columns(tmp_path / "r.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_larger_than_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"r{suffix}"
    if suffix == ".parquet":
        # packed to a hundredth of what it unpacks to
        pq.write_table(pa.table({"prompt": ["long " * 1000] * 1000}), path, compression="zstd", use_dictionary=False)
        assert path.stat().st_size < 1_000_000
    else:
        path.write_text('{"prompt": "a"}\n' * 100_000)
    monkeypatch.setattr("multiflora.tasks.files.memory_available", lambda: 1_000_000)
    with pytest.raises(DataError, match=rf"r{suffix} in .*: the rows need at least .* of memory are free"):
        check_size([path])


def test_a_damaged_parquet_file_says_after_which_row(tmp_path):
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 50), path, compression="none", use_dictionary=False)
    whole = bytearray(path.read_bytes())
    whole[20:60] = b"\xff" * 40
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"r\.parquet, after row 0: the Parquet file cannot be read"):
        columns(path)


def test_a_key_or_a_column_that_stands_twice_among_very_many_is_found(tmp_path: Path) -> None:
    """Looking for it took time by the square of their number: minutes for these."""
    names = [f"column{i}" for i in range(200_000)]
    (tmp_path / "r.csv").write_text(",".join([*names, names[-1]]), "utf-8")
    with pytest.raises(DataError, match="names the column 'column199999' twice"):
        list(read_rows(tmp_path / "r.csv"))
    keys = ", ".join(f'"{name}": 1' for name in [*names, names[-1]])
    (tmp_path / "r.jsonl").write_text(f"{{{keys}}}", "utf-8")
    with pytest.raises(DataError, match="the key 'column199999' stands twice"):
        list(read_rows(tmp_path / "r.jsonl"))


def test_a_row_that_does_not_fit_many_columns_is_told_in_a_message_one_can_read(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(",".join(f"c{i}" for i in range(100_000)) + "\n1,2\n", "utf-8")
    with pytest.raises(
        DataError, match=r"line 2 does not have the 100000 values of the header \(c0, .* more\)"
    ) as caught:
        list(read_rows(tmp_path / "r.csv"))
    assert len(str(caught.value)) < 3000


def test_equal_rows_that_are_packed_into_nothing_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000_000, np.int8)), pa.array(["a" * 100]))
    pq.write_table(pa.table({"prompt": column}), path)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(DataError, match="has more than 2,000,000 rows, which are all held in memory"):
        check_size([path])
    with pytest.raises(DataError, match="has more than 2,000,000 rows"):
        next(read_rows(path))


def test_a_time_zone_that_nobody_knows_is_said(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"at": pa.array([0], pa.timestamp("s", tz="Nowhere/Land"))}), path)
    with pytest.raises(DataError, match=r"r\.parquet, after row 0: the Parquet file cannot be read: .*Nowhere/Land"):
        list(read_rows(path))


def test_a_parquet_file_that_unpacks_to_more_than_memory_holds_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(256, np.int8)), pa.array(["a" * 3_000_000]))
    pq.write_table(pa.table({"prompt": column}), path)
    with pytest.raises(DataError, match=r"r\.parquet, after row 0: it takes more than 512 MiB of memory to read the"):
        list(read_rows(path))


def test_rows_of_parquet_files_come_in_order_whatever_happens_between_two_calls(tmp_path: Path) -> None:
    """The process that reads holds the place of one file; it may be another file's, or a new process."""
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    wanted = [[{"n": i, "text": name * 20_000} for i in range(600)] for name in "ab"]
    for path, rows in zip(paths, wanted, strict=True):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    both = [[row for _, row in pair] for pair in zip(*map(read_rows, paths), strict=True)]
    assert both == list(map(list, zip(*wanted, strict=True)))
    reading = read_rows(paths[0])
    first = [next(reading) for _ in range(300)]
    with pytest.raises(ValueError, match="memory"):
        run("operator:mul", "a", 10**12)
    assert [row for _, row in [*first, *reading]] == wanted[0]
    assert [where for where, _ in first][299] == f"{paths[0]}, row 300"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([datetime(2026, 1, 2, 3, 4, 5, 6)]),
        pa.array([date(2026, 1, 2)]),
        pa.array([timedelta(seconds=3)]),
        pa.array([Decimal("1.10")]),
        pa.array([b"\x00a"]),
        pa.array([[{"a": [1, None, 2.5], "b": True}]]),
        pa.array([float("inf")]),
    ],
)
def test_values_of_parquet_files_are_those_that_pyarrow_gives(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"value": column}), tmp_path / "r.parquet")
    assert list(read_rows(tmp_path / "r.parquet")) == [
        (f"{tmp_path / 'r.parquet'}, row 1", {"value": column[0].as_py()})
    ]


def test_a_pattern_over_a_huge_tree_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    for i in range(300):
        (tmp_path / "a" / f"{i}.jsonl").touch()
    source = FilesSource(train=(tmp_path / "**" / "*.jsonl",))
    assert len(split_files(source)["train"]) == 300
    monkeypatch.setattr("multiflora.tasks.files.MOST_FILES", 200)
    with pytest.raises(DataError, match=r"matches 300 files; expected at most 200"):
        split_files(source)
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 1e-4)
    with pytest.raises(DataError, match=r"it takes more than 0.0001 seconds to look through the folders"):
        split_files(source)
