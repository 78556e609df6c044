import json
import logging
import os
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from multiflora.errors import DataError
from multiflora.tasks import load_split, load_task
from multiflora.tasks.load import examples_of


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def shared():
    """The folder of real data beside the repository, which is not part of it."""
    folder = Path(os.environ.get("MULTIFLORA_SHARED") or Path(__file__).parents[4] / "shared")
    if not (folder / "data" / "tasks").is_dir():
        pytest.skip("the shared data are not here; MULTIFLORA_SHARED names their folder")
    return folder


def sums(n, start=0):
    return [{"q": f"{i} + 1", "a": str(i + 1), "topic": f"t{i // 5}"} for i in range(start, start + n)]


def task(source, **keys):
    return load_task({"name": "t", "source": source, "prompt": "{{ q }} =", "completion": " {{ a }}", **keys})


def prompts(spec, split, limit=None):
    return [e.prompt for e in examples_of(spec, split, limit)]


def test_the_columns_are_the_same_for_every_kind_of_task(tmp_path):
    place = str(write(tmp_path / "train.jsonl", sums(3)).parent)
    plain, choice, chat = (
        load_split(task(place, split_sizes={}, **keys), "train")
        for keys in (
            {"answer": "a"},
            {"completion": None, "choices": [" 0", " 1"], "answer": "1"},
            {"prompt": None, "messages": [{"role": "user", "content": "{{ q }}"}]},
        )
    )
    assert plain.column_names == ["id", "prompt", "completion", "choices", "answer", "messages", "tools"]
    assert concatenate_datasets([plain, choice, chat]).num_rows == 9
    assert (plain[0]["answer"], plain[0]["choices"], plain[0]["messages"]) == ("1", [], [])
    assert (choice[0]["answer"], choice[0]["choices"], choice[0]["completion"]) == ("1", [" 0", " 1"], " 1")
    turns = [("user", "0 + 1"), ("assistant", "1")]
    assert chat[0]["messages"] == [{"role": r, "content": c, "more": "", "loss": False} for r, c in turns]


def test_ids_are_the_place_in_the_split(tmp_path):
    write(tmp_path / "test.jsonl", sums(3))
    assert load_split(task(str(tmp_path)), "test")["id"][:] == ["t-test-0", "t-test-1", "t-test-2"]


def test_missing_splits_are_cut_disjoint_and_the_same_every_time(tmp_path):
    spec = task(str(write(tmp_path / "a.jsonl", sums(100))), split_sizes={"validation": 0.1, "test": 20})
    parts = {split: prompts(spec, split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "validation": 10, "test": 20}
    assert len(set().union(*parts.values())) == 100
    assert prompts(spec, "train") == parts["train"]
    other = spec.model_copy(update={"split_seed": 1})
    assert prompts(other, "test") != parts["test"]


def test_a_cut_split_is_the_same_whether_or_not_the_others_are_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", sums(50))
    write(tmp_path / "test.jsonl", sums(5, start=1000))
    spec = task(str(tmp_path), split_sizes={"validation": 10})
    train, validation, test = (set(prompts(spec, s)) for s in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (40, 10, 5)
    assert not train & validation


def test_a_group_never_crosses_a_cut(tmp_path):
    spec = task(str(write(tmp_path / "a.jsonl", sums(100))), group="topic", id="topic", split_sizes={"test": 0.2})
    homes = [{e.id for e in examples_of(spec, split)} for split in ("train", "test")]
    assert not homes[0] & homes[1]
    assert len(homes[1]) == 4


def test_a_group_or_a_prompt_of_the_test_split_is_dropped_from_training(tmp_path, caplog):
    write(tmp_path / "train.jsonl", [*sums(10), {"q": "77  + 1", "a": "78", "topic": "x"}])
    write(tmp_path / "test.jsonl", [{"q": "77 + 1", "a": "78", "topic": "t1"}])
    spec = task(str(tmp_path), split_sizes={})
    assert len(prompts(spec, "train")) == 10
    with caplog.at_level(logging.INFO, logger="multiflora"):
        assert prompts(spec.model_copy(update={"group": "topic"}), "train") == [f"{i} + 1 =" for i in range(5)]
    assert "t: 6 train rows left out, as another split has them" in caplog.text
    assert len(prompts(spec, "test")) == 1


def test_rows_without_a_group_are_not_one_group(tmp_path):
    rows = [{**row, "topic": None} for row in sums(20)]
    spec = task(str(write(tmp_path / "a.jsonl", rows)), group="topic", split_sizes={"test": 5})
    assert (len(prompts(spec, "train")), len(prompts(spec, "test"))) == (15, 5)


def test_a_group_that_is_no_column_is_named(tmp_path):
    spec = task(str(write(tmp_path / "a.jsonl", sums(9))), group="topik")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the group of task t names the column topik.*mean topic\?"):
        load_split(spec, "train")


def test_rows_that_keep_refuses_are_left_out_before_the_cut(tmp_path):
    rows = [{**row, "label": i % 2 - 1} for i, row in enumerate(sums(40))]
    spec = task(str(write(tmp_path / "a.jsonl", rows)), keep="label >= 0", split_sizes={"test": 5})
    assert (len(prompts(spec, "train")), len(prompts(spec, "test"))) == (15, 5)


def test_a_limit_is_a_seeded_sample_and_a_smaller_one_is_part_of_it(tmp_path):
    spec = task(str(write(tmp_path / "test.jsonl", sums(100)).parent))
    few, more, all_rows = prompts(spec, "test", 5), prompts(spec, "test", 20), prompts(spec, "test", 1000)
    assert (len(few), len(more), len(all_rows)) == (5, 20, 100)
    assert few == prompts(spec, "test", 5)
    assert set(few) < set(more)
    assert few != all_rows[:5]
    assert more == [p for p in all_rows if p in more]


def test_an_empty_task_is_refused_and_says_why(tmp_path):
    with pytest.raises(DataError, match="no rows, so the train split is empty"):
        load_split(task(str(write(tmp_path / "a.jsonl", []))), "train")
    with pytest.raises(DataError, match=r"task t is empty: of its 9 train rows none is left by keep \(a == '-'\)"):
        load_split(task(str(write(tmp_path / "a.jsonl", sums(9))), keep="a == '-'"), "train")
    write(tmp_path / "train.jsonl", sums(1))
    write(tmp_path / "test.jsonl", sums(1))
    with pytest.raises(
        DataError, match="task t is empty: each of its 1 train rows has its prompt or its group in test"
    ):
        load_split(task(str(tmp_path), split_sizes={}), "train")


def test_a_split_that_cannot_be_had_is_refused(tmp_path):
    write(tmp_path / "test.jsonl", sums(9))
    with pytest.raises(DataError, match=r"task t has no train split; it has test\. .*evaluate\.extra_tasks"):
        load_split(task(str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"task t has 1 train rows in 1 groups, too few to cut validation and test"):
        load_split(task(str(write(tmp_path / "one.jsonl", sums(1)))), "test")


def test_the_message_of_a_bad_row_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [*sums(3), {"q": "3 + 3", "b": "6"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 4: the completion of task t names the column a.*columns are q, b"
    ):
        load_split(task(str(path), split_sizes={}), "train")


def test_a_hub_data_set_in_a_local_folder_is_read_by_datasets(tmp_path):
    Dataset.from_list(sums(20)).to_parquet(tmp_path / "data" / "train-00000.parquet")
    Dataset.from_list(sums(4, start=50)).to_parquet(tmp_path / "data" / "test-00000.parquet")
    spec = task(
        {"path": str(tmp_path), "splits": {"train": "train", "test": "test[:3]"}}, split_sizes={"validation": 5}
    )
    assert [len(prompts(spec, s)) for s in ("train", "validation", "test")] == [15, 5, 3]


def test_several_configurations_are_read_one_after_the_other(tmp_path):
    for name, start in (("one", 0), ("two", 100)):
        Dataset.from_list(sums(3, start)).to_parquet(tmp_path / name / "test.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {n}\n  data_files: [{{split: test, path: {n}/test.parquet}}]\n" for n in ("one", "two")
        )
        + "---\n"
    )
    spec = task({"path": str(tmp_path), "name": ["one", "two"], "splits": {"test": "test"}})
    assert [e.id for e in examples_of(spec, "test")] == [f"t-test-{n}-{i}" for n in ("one", "two") for i in range(3)]


def test_a_hub_data_set_that_cannot_be_loaded_is_named(tmp_path):
    spec = task({"path": "nobody/nothing", "name": "main"})
    with pytest.raises(
        DataError, match=r"task t: the data set nobody/nothing \(configuration main, split train\) cannot"
    ):
        load_split(spec, "train")
    Dataset.from_list(sums(3)).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"split dev\) cannot be loaded: "):
        load_split(task({"path": str(tmp_path), "splits": {"train": "dev"}}), "train")


def test_the_ten_shared_tasks_load_as_they_are(shared):
    folders = sorted(p.parent for p in (shared / "data" / "tasks").glob("*/train.jsonl"))
    assert len(folders) == 10
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
        loaded = load_split(load_task(folder), "test")
        for row, example in zip(rows, loaded, strict=True):
            assert (example["id"], example["prompt"], example["completion"]) == (
                row["id"],
                row["prompt"],
                row["completion"],
            )
            assert example["choices"] == row.get("choices", [])
            assert example["answer"] == str(row.get("answer", ""))
