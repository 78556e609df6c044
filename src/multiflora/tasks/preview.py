"""What the model will see, for eyes: rendered examples with everything that carries loss in brackets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from multiflora.tasks.example import Example
from multiflora.tasks.load import examples_of
from multiflora.tasks.render import keeps, render
from multiflora.tasks.shipped import ShippedTask
from multiflora.tasks.spec import HubSource, Split, TaskSpec

__all__ = ["pieces_of", "preview", "sample_examples"]

Piece = tuple[str, bool]
"""A stretch of text, and whether it carries loss."""

OPEN, CLOSE, LINE_END, NO_TOKENIZER_END = "⟦", "⟧", "↵", "end of text"


def sample_examples(
    task: ShippedTask | TaskSpec, count: int = 3, *, split: Split = "train", from_hub: bool = False
) -> list[Example]:
    """Render a few examples of a task.

    Args:
        task: The task. For a shipped one over a hub data set its sample rows are rendered, which need no network.
        count: How many.
        split: Which split, where the source is read.
        from_hub: Read the hub data set itself instead of the sample rows.
    """
    if isinstance(task, ShippedTask) and isinstance(task.spec.source, HubSource) and not from_hub:
        rows = [(f"{task.spec.name}, sample row {i}", row) for i, row in enumerate(task.sample_rows)]
        kept = [(where, row) for where, row in rows if keeps(task.spec, row, where)]
        return [render(task.spec, row, where) for where, row in kept[:count]]
    spec = task.spec if isinstance(task, ShippedTask) else task
    return examples_of(spec, split, limit=count)


def pieces_of(tokenizer: Any, ids: Sequence[int], loss: Sequence[bool]) -> list[Piece]:
    """Return the text of every token and whether it carries loss.

    A token that ends within a character shows nothing; the one that completes the character shows it.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Tokens of an example, the end of text included.
        loss: Whether each carries loss.
    """
    pieces: list[Piece] = []
    shown = ""
    for i in range(len(ids)):
        whole = tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)
        piece = "" if whole.endswith("\ufffd") and i + 1 < len(ids) else whole[len(shown) :]
        shown += piece
        pieces.append((piece, loss[i]))
    return pieces


def preview(example: Example, pieces: Sequence[Piece] | None = None) -> Text:
    """Draw one example: what carries loss stands in double brackets and in colour, a line end shows as an arrow.

    Args:
        example: The rendered row.
        pieces: Its tokens, from ``pieces_of``, each of which then gets brackets of its own; None: the two spans.

    Example:
        >>> print(preview(Example("sums", "sums-0", "1 + 2 =", " 3")))
        sums-0
        1 + 2 =⟦ 3⟧⟦end of text⟧
    """
    title = Text(example.id, style="bold")
    if example.choices:
        title.append(f"  choices: {' |'.join(example.choices)}", style="dim")
    elif example.answer is not None:
        title.append(f"  answer: {example.answer}", style="dim")
    if pieces is None:
        pieces = [(example.prompt, False), (example.completion, True), (NO_TOKENIZER_END, True)]
    body = Text()
    for number, (piece, carries_loss) in enumerate(pieces):
        text = piece.replace("\n", f"{LINE_END}\n")
        if carries_loss:
            body.append(f"{OPEN}{text}{CLOSE}", style="bold green")
        else:
            body.append(text, style="default" if number % 2 == 0 else "cyan")
    return Text("\n").join([title, body])
