"""Examples for calibration and composition, as tokens: from a JSONL file, a recipe, a run, or rows in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiflora.data.encode import IGNORED, encode_example, encode_text
from multiflora.errors import DataError

__all__ = ["Tokens", "read_examples"]


@dataclass(frozen=True)
class Tokens:
    """One example."""

    ids: list[int]
    labels: list[int]
    """The ids that carry loss, -100 elsewhere."""
    task: str | None


def read_examples(
    source: str | Path | Sequence[Any], tokenizer: Any, *, limit: int | None = None, max_length: int = 1024
) -> list[Tokens]:
    """Read examples and turn them into tokens.

    Args:
        source: One of: a file of rows (.jsonl, .json, .csv, .tsv, .parquet); a recipe (.yaml) or a run's folder, whose
            tasks' training rows are taken; or rows. A row has ``text``, or ``prompt`` and ``completion``, or
            ``input_ids``; and ``task`` where it belongs to one. A plain text is a row too.
        tokenizer: Not needed for rows of ``input_ids``.
        limit: At most this many examples, of each task of a recipe, or the first of a file.
        max_length: Longer examples are cut at their end, in tokens.

    Raises:
        DataError: There is no example, or a row is none of these forms.
    """
    chat = False
    if isinstance(source, str | Path):
        rows, chat = _from_path(Path(source), limit)
    else:
        rows = [(f"row {number}", row) for number, row in enumerate(source)][:limit]
    found = [_tokens(row, where, tokenizer, chat, max_length) for where, row in rows]
    if not found:
        raise DataError(f"{source if isinstance(source, str | Path) else 'The list of examples'} holds no example.")
    return found


def _from_path(path: Path, limit: int | None) -> tuple[list[tuple[str, Any]], bool]:
    from multiflora.tasks.files import read_rows

    if path.is_dir() or path.suffix in (".yaml", ".yml"):
        return _from_recipe(path, limit)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Give a file of examples (rows with text, or prompt and completion), a recipe or a "
            "run's folder."
        )
    return list(read_rows(path))[:limit], False


def _from_recipe(path: Path, limit: int | None) -> tuple[list[tuple[str, Any]], bool]:
    """The training rows of a recipe's tasks, and whether its model reads a chat template."""
    from multiflora.recipe import load_recipe
    from multiflora.tasks.load import examples_of

    file = path / "recipe.yaml" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path} holds no recipe.yaml; give a run's folder, a recipe or a file of examples.")
    recipe = load_recipe(file)
    rows = [(example.id, example) for task in recipe.tasks for example in examples_of(task, "train", limit)]
    return list(rows), recipe.model.chat_template


def _tokens(row: Any, where: str, tokenizer: Any, chat: bool, max_length: int) -> Tokens:
    from multiflora.tasks import Example

    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, Example):
        encoded = encode_example(row, tokenizer, chat_template=chat)
        labels = [i if loss else IGNORED for i, loss in zip(encoded.ids, encoded.loss, strict=True)]
        return Tokens(encoded.ids[:max_length], labels[:max_length], row.task)
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected a text or a mapping with text or prompt.")
    task = row.get("task")
    if "input_ids" in row:
        ids = [int(i) for i in row["input_ids"]][:max_length]
        return Tokens(ids, list(row.get("labels", ids))[:max_length], task)
    if "prompt" in row:
        return _pair(str(row["prompt"]), str(row.get("completion", "")), task, tokenizer, max_length)
    if "text" in row:
        return _pair("", str(row["text"]), task, tokenizer, max_length)
    raise DataError(f"{where} has the columns {', '.join(map(str, row))}; expected text, or prompt and completion.")


def _pair(prompt: str, completion: str, task: str | None, tokenizer: Any, max_length: int) -> Tokens:
    first, rest = encode_text(prompt, completion, tokenizer)
    ids = (first + rest)[:max_length]
    return Tokens(ids, ([IGNORED] * len(first) + rest)[:max_length], task)
