"""From a TaskSpec to the rendered examples of one split: read, keep, cut, render, drop what another split has."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from multiflora.errors import DataError
from multiflora.once import once
from multiflora.tasks.example import Example, Message
from multiflora.tasks.jinja import ahead
from multiflora.tasks.render import evaluated, keeps, render
from multiflora.tasks.sources import Row, read_source, splits_there
from multiflora.tasks.spec import SPLITS, Split, TaskSpec
from multiflora.tasks.splits import cut, without_shared

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["example_of", "examples_of", "load_split", "rows_of"]

log = logging.getLogger(__name__)


def load_split(spec: TaskSpec, split: Split, limit: int | None = None) -> Dataset:
    """Render one split of a task.

    A split that the source lacks is cut from ``spec.split_from``, seeded and disjoint. A row whose prompt (lower case,
    white space made one) or whose ``group`` is in test is dropped from validation and train; one that is in
    validation, from train. The test split stays as it is published.

    Args:
        spec: The task.
        split: Which split.
        limit: At most this many examples, a seeded sample in the order of the split; None: all.

    Returns:
        A data set with the columns ``id``, ``prompt``, ``completion``, ``choices`` (list of text), ``answer`` (text;
        with choices the index as digits), ``messages`` (see `Message`) and ``tools`` (JSON); what a task lacks is
        empty. A task with a worse completion has the column ``rejected``, too.

    Raises:
        DataError: A file is missing or malformed, the split is missing and cannot be cut, a template does not fit the
            rows, or nothing is left.
    """
    from datasets import Dataset, Features, List, Value  # here: `multiflora tasks` lists tasks without it

    # written out: inferred features differ between tasks with and without choices, and could not be put together
    features = Features(
        {
            "id": Value("string"),
            "prompt": Value("string"),
            "completion": Value("string"),
            "choices": List(Value("string")),
            "answer": Value("string"),
            "messages": List(
                {
                    "role": Value("string"),
                    "content": Value("string"),
                    "more": Value("string"),
                    "loss": Value("bool"),
                }
            ),
            "tools": Value("string"),
            **({} if spec.rejected is None else {"rejected": Value("string")}),
        }
    )
    columns = [{key: _columns(e)[key] for key in features} for e in examples_of(spec, split, limit)]
    return Dataset.from_list(columns, features=features)


def examples_of(spec: TaskSpec, split: Split, limit: int | None = None) -> list[Example]:
    """Render one split as a list of Examples; see ``load_split``."""
    return list(once(("examples", spec.model_dump_json(), split, limit), lambda: _examples_of(spec, split, limit)))


def _examples_of(spec: TaskSpec, split: Split, limit: int | None) -> list[Example]:
    higher = SPLITS[SPLITS.index(split) + 1 :]
    rows = rows_of(spec, (split, *higher))
    if split not in rows:
        raise DataError(_no_split(spec, split))
    keys = {s: [_example(spec, row) for row in _ahead(spec, rows[s])] for s in rows}
    groups = {s: [_group(spec, row) for row in _ahead(spec, rows[s], spec.group)] for s in rows}
    prompts = {s: list(zip((e.prompt for e in keys[s]), groups[s], strict=True)) for s in rows}
    kept = without_shared(prompts[split], [pair for s in higher if s in rows for pair in prompts[s]])
    left_out = len(rows[split]) - len(kept)
    if left_out:
        log.info("%s: %d %s rows left out, as another split has them", spec.name, left_out, split)
    if not kept:
        raise DataError(
            f"task {spec.name} is empty: each of its {len(rows[split])} {split} rows has its prompt or its group in "
            f"{' or '.join(s for s in higher if s in rows)} too. Give it other rows, or other splits."
        )
    if limit is not None and limit < len(kept):
        # a prefix of one shuffle, so that a smaller limit is a subset of a larger one
        order = random.Random(f"{spec.split_seed} {split}").sample(kept, len(kept))
        kept = sorted(order[:limit])
    return [keys[split][i] for i in kept]


def rows_of(spec: TaskSpec, wanted: Sequence[Split]) -> dict[Split, list[Row]]:
    """Read the wanted splits, leave out rows that ``keep`` refuses, and cut the splits that the source lacks."""
    there = splits_there(spec)
    cut_from_there = spec.split_from in there
    missing = {s: spec.split_sizes[s] for s in SPLITS if s not in there and s in spec.split_sizes and cut_from_there}
    needs_cut = any(s in missing or (missing and s == spec.split_from) for s in wanted)
    needed = [s for s in there if s in wanted or (needs_cut and s == spec.split_from)]
    read = read_source(spec, needed)
    kept = {
        split: [r for r in _ahead(spec, rows, spec.keep) if keeps(spec, r.columns, r.where)]
        for split, rows in read.items()
    }
    for split, rows in kept.items():
        if not rows:
            raise DataError(
                f"task {spec.name} is empty: of its {len(read[split])} {split} rows none is left"
                f"{f' by keep ({spec.keep})' if spec.keep else ''}. Check the source and the condition."
            )
    if needs_cut:
        kept |= _cut(spec, kept[spec.split_from], missing)
    return {s: kept[s] for s in wanted if s in kept}


def _cut(spec: TaskSpec, rows: list[Row], sizes: Mapping[Split, float]) -> dict[Split, list[Row]]:
    groups = [_group(spec, row) or row.name for row in _ahead(spec, rows, spec.group)]
    parts = cut(groups, sizes, seed=spec.split_seed)
    empty = [split for split, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"task {spec.name} has {len(rows)} {spec.split_from} rows in {len(set(groups))} groups, too few to cut "
            f"{' and '.join(sizes)} from them. Give those splits in the source, or set smaller split_sizes."
        )
    return {split or spec.split_from: [rows[i] for i in part] for split, part in parts.items()}


def _ahead(spec: TaskSpec, rows: list[Row], *expressions: str | None) -> Iterator[Row]:
    """Go through rows with some expressions rendered ahead; none given: all that makes an example of a row."""
    sources = [(source, True) for source in expressions if source is not None]
    if not expressions:
        several = [each for each in (spec.choices, spec.messages) if each is not None and not isinstance(each, str)]
        texts = [each if isinstance(each, str) else each.content for group in several for each in group]
        sources = [(text, False) for text in (spec.prompt, spec.completion, spec.rejected, *texts) if text is not None]
        words = (spec.answer, spec.id, spec.choices, spec.messages)
        sources += [(word, True) for word in words if isinstance(word, str)]
    return ahead(rows, lambda row: row.columns, sources)


def _example(spec: TaskSpec, row: Row) -> Example:
    return render(spec, row.columns, row.where, id=f"{spec.name}-{row.name}")


def _group(spec: TaskSpec, row: Row) -> str | None:
    if spec.group is None:
        return None
    value = evaluated(spec.group, row.columns, f"group of task {spec.name}", row.where)
    return None if value is None else str(value)  # rows without a group are not one group


def _columns(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "prompt": example.prompt,
        "completion": example.completion,
        "choices": list(example.choices),
        "answer": "" if example.answer is None else str(example.answer),
        "messages": [turn._asdict() for turn in example.messages],
        "tools": example.tools,
        "rejected": example.rejected,
    }


def example_of(task: str, row: Mapping[str, Any]) -> Example:
    """The example of a row of `load_split`.

    Args:
        task: Name of the task.
        row: Its columns.
    """
    choices = tuple(row["choices"])
    answer = int(row["answer"]) if choices else row["answer"] or None
    turns = tuple(Message(**turn) for turn in row["messages"])
    rejected = row.get("rejected") or ""
    return Example(task, row["id"], row["prompt"], row["completion"], choices, answer, turns, row["tools"], rejected)


def _no_split(spec: TaskSpec, split: Split) -> str:
    there = splits_there(spec)
    if not there:
        return f"task {spec.name} is empty: its source names no split with rows. Name one, e.g. train."
    return (
        f"task {spec.name} has no {split} split; it has {', '.join(there)}. Name one in 'source', or have it cut: "
        f"split_from: {there[0]}, split_sizes: {{{split}: 0.1}}. A task without training rows is for "
        "evaluation: put it under evaluate.extra_tasks."
    )
