"""Prompt and completion become token ids, with the loss on the completion only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from multiflora.errors import DataError
from multiflora.tasks.chat import as_text
from multiflora.tasks.example import Example, Message

__all__ = ["IGNORED", "EncodedTask", "encode", "encode_text"]

IGNORED = -100
"""Label of a token that carries no loss; torch's and transformers' own number for it."""


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

    def note(self) -> str | None:
        """Say in one sentence what was left out; None if nothing was."""
        if not self.num_too_long:
            return None
        total = len(self.dataset) + self.num_too_long
        return (
            f"{self.task}: {self.num_too_long:,} of {total:,} examples are longer than train.max_length = "
            f"{self.max_length} tokens (the longest has {self.longest:,}) and are left out."
        )


def encode_text(
    prompt: str, completion: str, tokenizer: Any, *, chat_template: bool = False
) -> tuple[list[int], list[int]]:
    r"""Return the ids of the prompt and the ids of the completion with EOS, as the model will see them.

    The completion's ids are what the tokenizer adds to the prompt's when it reads both together, as the scoring of
    choices does; a SentencePiece tokenizer would otherwise put a space of its own before every completion. Where the
    boundary itself would change (a prompt that ends in blank lines, say), the two are tokenised apart, as in generation
    the model sees the prompt's own ids.

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
    return _encode_pairs([prompt], [completion], tokenizer, chat_template=chat_template)[0]


def encode(
    rows: Dataset,
    tokenizer: Any,
    *,
    task: str,
    task_id: int,
    max_length: int,
    chat_template: bool = False,
) -> EncodedTask:
    """Encode a task's rows; examples that do not fit are left out and counted, never cut.

    Args:
        rows: Columns ``prompt``, ``completion`` and, optionally, ``messages``, as ``load_split`` returns them.
        tokenizer: Any Hugging Face tokenizer with an EOS.
        task: Name of the task, for messages.
        task_id: The task's number in the recipe; every example carries it from here on.
        max_length: Longest example that is kept, in tokens, EOS included.
        chat_template: Put the conversation through the tokenizer's chat template; a plain prompt is one user turn.
    Raises:
        DataError: There are no rows, none of them fits, or the tokenizer has no EOS.
        ConfigError: The tokenizer's chat template is asked for and absent, or not fit for training.
    """
    if len(rows) == 0:
        raise DataError(f"Task {task!r} has no training examples; expected at least one. Check its source and 'keep'.")
    encoded = rows.map(
        _encode_rows,
        batched=True,
        remove_columns=[column for column in rows.column_names if column != "id"],
        fn_kwargs={"tokenizer": tokenizer, "task": task, "task_id": task_id, "chat_template": chat_template},
        load_from_cache_file=False,
        desc=f"tokens of {task}",
    )
    lengths = encoded.with_format("numpy")["length"][:]
    fits = lengths <= max_length
    if not fits.any():
        raise DataError(
            f"Task {task!r} has no example of at most train.max_length = {max_length} tokens: its shortest "
            f"has {lengths.min()}. Raise train.max_length to {lengths.max()} to keep them all, or leave the "
            "task out."
        )
    return EncodedTask(
        task=task,
        dataset=encoded if fits.all() else encoded.select(fits.nonzero()[0]),
        num_too_long=int((~fits).sum()),
        longest=int(lengths.max()),
        max_length=max_length,
    )


def _encode_rows(
    batch: Mapping[str, Sequence[Any]], *, tokenizer: Any, task: str, task_id: int, chat_template: bool
) -> dict[str, list[Any]]:
    """Encode a batch of rows into columns."""
    prompts, completions = batch["prompt"], batch["completion"]
    if chat_template:
        turns = batch.get("messages") or [()] * len(prompts)
        texts = [
            as_text(
                Example(task, "", prompt, completion, messages=tuple(Message(**turn) for turn in messages)),
                tokenizer,
                True,
            )
            for prompt, completion, messages in zip(prompts, completions, turns, strict=True)
        ]
        prompts, completions = zip(*texts, strict=True)
    pairs = _encode_pairs(prompts, completions, tokenizer, chat_template=chat_template)
    inputs = [prompt + completion for prompt, completion in pairs]
    # the very first token is never predicted, so it carries no loss even where the prompt is empty
    labels = [[IGNORED, *([IGNORED] * len(prompt) + completion)[1:]] for prompt, completion in pairs]
    return {
        "input_ids": inputs,
        "labels": labels,
        "task_id": [task_id] * len(inputs),
        "length": [len(ids) for ids in inputs],
        "loss_tokens": [sum(label != IGNORED for label in row) for row in labels],
    }


def _encode_pairs(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, *, chat_template: bool
) -> list[tuple[list[int], list[int]]]:
    """Encode pairs of texts; see `encode_text`."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "The tokenizer has no EOS token, so a model trained with it could not learn where an answer "
            "ends; expected one. Set eos_token in the model's tokenizer_config.json."
        )
    special = {"add_special_tokens": not chat_template}  # a chat template writes its own
    closes = not chat_template and tokenizer("a").input_ids[-1:] == [eos]  # some tokenizers close every text
    together = tokenizer([p + c for p, c in zip(prompts, completions, strict=True)], **special).input_ids
    alone = tokenizer(list(prompts), **special).input_ids
    pairs = []
    for prompt_ids, whole, completion in zip(alone, together, completions, strict=True):
        if closes:
            prompt_ids, whole = prompt_ids[:-1], whole[:-1]
        if whole[: len(prompt_ids)] == prompt_ids:
            completion_ids = whole[len(prompt_ids) :]
        else:
            completion_ids = tokenizer(completion, add_special_tokens=False).input_ids
        pairs.append((prompt_ids, [*completion_ids, eos]))
    return pairs
