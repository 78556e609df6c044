"""Text becomes token ids, with the loss on what the model should write: one place for training, scoring and serving.

A tokenizer puts something before a text (BOS) and perhaps behind it (EOS). Before a prompt goes what the tokenizer puts
there, unless a chat template has written the text; behind it goes nothing, as the text is to go on. EOS stands behind a
completion, once.

The ids of a prompt follow from the prompt alone, as whoever generates has nothing else. White space at its end belongs
to what comes next, because tokenizers put a space and the word behind it into one token. A completion's ids are what
the tokenizer adds to the prompt's when it reads both together; where it would read the prompt itself in another way
then (the boundary lies within a token), the completion is tokenised by itself. Why: docs/decisions/0020-one-way-to-ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import category

from multiflora.errors import DataError
from multiflora.objective import Objective
from multiflora.tasks.chat import Span, ahead, spans_of
from multiflora.tasks.example import Example, Message, answered

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "IGNORED",
    "Encoded",
    "EncodedTask",
    "encode",
    "encode_example",
    "encode_spans",
    "encode_text",
    "moved_space",
    "prompt_ids",
    "text_ids",
]

IGNORED = -100
"""Label of a token that carries no loss; torch's and transformers' own number for it."""


_OF_ROWS = ("prompt", "completion", "choices", "answer", "messages", "tools")
"""Columns that a row keeps where answers to it are scored."""


class Encoded(NamedTuple):
    """One example as tokens."""

    ids: list[int]
    """The whole text, EOS included."""
    loss: list[bool]
    """Whether each of them carries loss."""
    is_split: bool
    """Whether a boundary lies within a token of the whole text."""

    def prompt(self) -> list[int]:
        """The ids before the last answer, which is the last stretch with loss."""
        end = len(self.ids)
        while end and self.loss[end - 1]:
            end -= 1
        return self.ids[:end]

    def labels(self) -> list[int]:
        """The ids that carry loss, `IGNORED` elsewhere; the very first token is never predicted, so it carries none."""
        return [i if loss and k else IGNORED for k, (i, loss) in enumerate(zip(self.ids, self.loss, strict=True))]


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task's examples as tokens, and what was left out on the way."""

    task: str
    """Name of the task."""
    dataset: Dataset
    """Columns ``input_ids``, ``labels``, ``task_id``; ``length`` and ``loss_tokens``, in tokens; ``id`` of the row."""
    num_too_long: int
    """Examples left out because they are longer than ``max_length``."""
    longest: int
    """Length of the longest example before any was left out, in tokens."""
    max_length: int
    """The limit, in tokens."""
    limit: str = "train.max_length"
    """What sets the limit, for messages."""
    num_spaces: int = 0
    """Prompts that end in a space, which is read as the beginning of what follows."""
    num_split: int = 0
    """Examples whose completion begins within a token of the whole text."""

    def note(self) -> str | None:
        """Say in a sentence each what was left out and what a reader might not expect; None if nothing was."""
        total, told = len(self.dataset) + self.num_too_long, []
        if self.num_too_long:
            told.append(
                f"{self.task}: {self.num_too_long:,} of {total:,} examples are longer than {self.limit} = "
                f"{self.max_length} tokens (the longest has {self.longest:,}) and are left out."
            )
        if self.num_spaces:
            told.append(
                f"{self.task}: {self.num_spaces:,} of {total:,} prompts end in a space; it is read as the beginning of "
                "the completion, in training, scoring and serving alike."
            )
        if self.num_split:
            told.append(
                f"{self.task}: in {self.num_split:,} of {total:,} examples the completion begins within a token "
                "(as in 'posi' + 'tive'), so it is tokenised by itself. Let it begin with a space, or the prompt end "
                "at a word's end."
            )
        return " ".join(told) or None


def encode_text(
    prompt: str, completion: str, tokenizer: Any, *, chat_template: bool = False
) -> tuple[list[int], list[int]]:
    r"""Return the ids of the prompt and the ids of the completion with EOS, as the model will see them.

    Args:
        prompt: What the model reads, as `multiflora.tasks.as_text` returns it.
        completion: What it should write.
        tokenizer: Any Hugging Face tokenizer with an EOS; it decides whether a BOS is put first.
        chat_template: The texts come from a chat template, which has written its own special tokens.
    Returns:
        Ids of the prompt, ids of the completion; their concatenation is the training text.
    Raises:
        DataError: The tokenizer has no EOS.
    Example:
        >>> prompt_ids, completion_ids = encode_text("2 + 2 =", " 4", tokenizer)  # doctest: +SKIP
    """
    ids, loss, _ = encode_spans([[(prompt, False), (completion, True)]], tokenizer, chat_template=chat_template)[0]
    first = loss.index(True)
    return ids[:first], ids[first:]


def prompt_ids(prompt: str, tokenizer: Any, *, chat_template: bool = False) -> list[int]:
    """Return the ids that an answer is written behind; the prompt's of `encode_text`.

    Args:
        prompt: What the model reads.
        tokenizer: Any Hugging Face tokenizer.
        chat_template: The text comes from a chat template, which has written its own special tokens.

    Example:
        >>> prompt_ids("2 + 2 = ", tokenizer) == prompt_ids("2 + 2 =", tokenizer)  # doctest: +SKIP
        True
    """
    return text_ids(prompt[: len(prompt) - len(moved_space(prompt))], tokenizer, chat_template=chat_template)


def text_ids(text: str, tokenizer: Any, *, chat_template: bool = False) -> list[int]:
    """Return the ids of a whole text with what the tokenizer puts before it, and nothing behind; see `prompt_ids`."""
    before = [] if chat_template else _put_before(tokenizer)
    return _behind(before, _ids([text], tokenizer)[0])


def moved_space(prompt: str) -> str:
    """The spaces at the end of a prompt, which go to what comes next; none where there is nothing else.

    Tabs and line ends are no spaces: tokenizers keep them apart from a word.

    Example:
        >>> moved_space("Sentiment: "), moved_space("Sentiment:\\n"), moved_space(" ")
        (' ', '', '')
    """
    end = len(prompt)
    while end and category(prompt[end - 1]) == "Zs":
        end -= 1
    return prompt[end:] if end else ""


def encode_example(example: Example, tokenizer: Any, *, chat_template: bool = False) -> Encoded:
    """Encode one example.

    Args:
        example: The rendered row.
        tokenizer: Any Hugging Face tokenizer with an EOS.
        chat_template: Put the conversation through the tokenizer's chat template.

    Raises:
        DataError: The tokenizer has no EOS, or its template does not take the conversation.
        ConfigError: The tokenizer's chat template is asked for and absent, or not fit for training.
    """
    return encode_spans([spans_of(example, tokenizer, chat_template)], tokenizer, chat_template=chat_template)[0]


def encode_spans(examples: Sequence[Sequence[Span]], tokenizer: Any, *, chat_template: bool = False) -> list[Encoded]:
    """Encode texts that are given in stretches with and without loss, of which the last one is with.

    Args:
        examples: For each its stretches, the first one without loss.
        tokenizer: Any Hugging Face tokenizer with an EOS.
        chat_template: The texts come from a chat template, which has written its own special tokens.

    Raises:
        DataError: The tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "The tokenizer has no EOS token, so a model trained with it could not learn where an answer "
            "ends; expected one. Set eos_token in the model's tokenizer_config.json."
        )
    before = [] if chat_template else _put_before(tokenizer)
    moved = [_with_spaces_moved(spans) for spans in examples]
    # every text up to the end of each stretch, in one call: a tokenizer is fast for many texts at once
    known = iter(_ids([text for spans in moved for text in accumulate(text for text, _ in spans)], tokenizer))
    return [_joined(spans, [_behind(before, next(known)) for _ in spans], tokenizer, eos) for spans in moved]


def _with_spaces_moved(spans: Sequence[Span]) -> list[Span]:
    """The same text with the spaces before each stretch with loss moved into it."""
    moved, space = [], ""
    for k, (text, loss) in enumerate(spans):
        text, space = space + text, ""
        if not loss and k + 1 < len(spans):
            space = moved_space(text)
            text = text[: len(text) - len(space)]
        moved.append((text, loss))
    return moved


def _joined(spans: Sequence[Span], known: Sequence[list[int]], tokenizer: Any, eos: int) -> Encoded:
    """Put the stretches' ids together: each has what it adds to the ids of the text before it.

    Args:
        spans: The stretches.
        known: For each the ids of the text up to its end.
        tokenizer: The tokenizer.
        eos: Ends the text.
    """
    ids: list[int] = []
    loss: list[bool] = []
    last: list[int] = []
    is_split = False
    for (text, carries), whole in zip(spans, known, strict=True):
        if whole[: len(last)] == last:
            new = whole[len(last) :]
        else:
            new, is_split = _by_itself(text, tokenizer), True
        ids += new
        loss += [carries] * len(new)
        last = whole
    if ids[-1:] != [eos] or not loss[-1]:
        ids.append(eos)
        loss.append(True)
    return Encoded(ids, loss, is_split)


def _by_itself(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text that stands behind another one: without the space that some tokenizers put before a text."""
    for anchor in ("\n", ".", "a"):
        first, both = _ids([anchor, anchor + text], tokenizer)
        if first and both[: len(first)] == first:
            return both[len(first) :]
    return _ids([text], tokenizer)[0]


def _put_before(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text; what it puts behind one is of no use here.

    Example:
        >>> _put_before(tokenizer)  # doctest: +SKIP
        [1]
    """
    special = set(tokenizer.all_special_ids)
    for text in ("a", "1", ".", "\n"):
        plain, full = _ids([text], tokenizer)[0], list(tokenizer(text).input_ids)
        if plain and not special & set(plain):
            starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
            return full[: next(starts, 0)]
    return []


def _behind(before: list[int], ids: list[int]) -> list[int]:
    """The ids with what goes before them, unless it stands there already, written out in the text."""
    return ids if ids[: len(before)] == before else before + ids


def _ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []


def encode(
    rows: Dataset,
    tokenizer: Any,
    *,
    task: str,
    task_id: int,
    max_length: int,
    chat_template: bool = False,
    limit: str = "train.max_length",
    objective: Objective = "sft",
) -> EncodedTask:
    """Encode a task's rows; examples that do not fit are left out and counted, never cut.

    For ``grpo`` an example is its prompt, without labels, and keeps the row's own columns, by which answers are
    scored. For ``dpo`` it has a second text beside the first: ``rejected_ids`` and ``rejected_labels``.

    Args:
        rows: Columns ``prompt``, ``completion`` and, optionally, ``messages`` and ``tools``, as ``load_split`` returns
            them.
        tokenizer: Any Hugging Face tokenizer with an EOS.
        task: Name of the task, for messages.
        task_id: The task's number in the recipe; every example carries it from here on.
        max_length: Longest example that is kept, in tokens, EOS included.
        chat_template: Put the conversation through the tokenizer's chat template; a plain prompt is one user turn.
        limit: What sets ``max_length``, for messages.
        objective: What the examples are for.
    Raises:
        DataError: There are no rows, none of them fits, the tokenizer has no EOS, or a preference has one side.
        ConfigError: The tokenizer's chat template is asked for and absent, or not fit for training.
    """
    if len(rows) == 0:
        raise DataError(f"Task {task!r} has no training examples; expected at least one. Check its source and 'keep'.")
    kept = ("id", *(_OF_ROWS if objective == "grpo" else ()))
    encoded = rows.map(
        _encode_rows,
        batched=True,
        remove_columns=[column for column in rows.column_names if column not in kept],
        fn_kwargs={
            "tokenizer": tokenizer,
            "task": task,
            "task_id": task_id,
            "chat_template": chat_template,
            "objective": objective,
        },
        load_from_cache_file=False,
        desc=f"tokens of {task}",
    )
    facts = encoded.with_format("numpy")
    lengths = facts["length"][:]
    counts = {name: int(facts[name][:].sum()) for name in ("is_split", "has_space")}
    encoded = encoded.remove_columns(list(counts))
    fits = lengths <= max_length
    if not fits.any():
        raise DataError(
            f"Task {task!r} has no example of at most {limit} = {max_length} tokens: its shortest "
            f"has {lengths.min()}. {_advice(limit, int(lengths.max()))}, or leave the task out."
        )
    return EncodedTask(
        task=task,
        dataset=encoded if fits.all() else encoded.select(fits.nonzero()[0]),
        num_too_long=int((~fits).sum()),
        longest=int(lengths.max()),
        max_length=max_length,
        limit=limit,
        num_spaces=counts["has_space"],
        num_split=counts["is_split"],
    )


def _advice(limit: str, longest: int) -> str:
    if limit.startswith("train."):
        return f"Raise {limit} to {longest} to keep them all"
    return f"Take a model that reads {longest} tokens to keep them all"


def _encode_rows(
    batch: Mapping[str, Sequence[Any]],
    *,
    tokenizer: Any,
    task: str,
    task_id: int,
    chat_template: bool,
    objective: Objective,
) -> dict[str, list[Any]]:
    """Encode a batch of rows into columns."""
    number = len(batch["prompt"])
    columns = (batch["prompt"], batch["completion"], batch.get("messages") or [()] * number)
    names = batch.get("id") or [f"{task}, example {k}" for k in range(number)]
    examples = [
        Example(task, name, prompt, completion, messages=tuple(Message(**turn) for turn in turns), tools=tools)
        for name, prompt, completion, turns, tools in zip(
            names, *columns, batch.get("tools") or [""] * number, strict=True
        )
    ]
    spans = [spans_of(example, tokenizer, chat_template) for example in ahead(examples, tokenizer, chat_template)]
    encoded = encode_spans(spans, tokenizer, chat_template=chat_template)
    if objective == "grpo":
        encoded = [each._replace(ids=each.prompt(), loss=[False] * len(each.prompt())) for each in encoded]
    labels = [each.labels() for each in encoded]
    made: dict[str, list[Any]] = {
        "input_ids": [each.ids for each in encoded],
        "labels": labels,
        "task_id": [task_id] * number,
        "length": [len(each.ids) for each in encoded],
        "loss_tokens": [_count(row) for row in labels],
        "is_split": [each.is_split for each in encoded],
        "has_space": [bool(moved_space(stretches[-2][0])) for stretches in spans],
    }
    if objective != "dpo":
        return made
    others = [_with_rejected(example, text) for example, text in zip(examples, batch["rejected"], strict=True)]
    spans = [spans_of(example, tokenizer, chat_template) for example in ahead(others, tokenizer, chat_template)]
    rejected = encode_spans(spans, tokenizer, chat_template=chat_template)
    made |= {"rejected_ids": [each.ids for each in rejected]}
    made |= {"rejected_labels": [each.labels() for each in rejected]}
    # both texts are read, and the longer one decides whether the pair fits
    made["length"] = [max(len(a.ids), len(b.ids)) for a, b in zip(encoded, rejected, strict=True)]
    made["loss_tokens"] = [
        _count(chosen) + _count(other) for chosen, other in zip(labels, made["rejected_labels"], strict=True)
    ]
    return made


def _with_rejected(example: Example, rejected: str) -> Example:
    """The example with its worse completion in the better one's place."""
    if rejected.strip() == example.completion.strip():
        raise DataError(
            f"{example.id}: the rejected text is the completion, {example.completion[:60]!r}; expected two different "
            "ones, of which the first is preferred. Leave such rows out with 'keep', e.g. keep: chosen != rejected."
        )
    return answered(example, rejected)


def _count(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels)
