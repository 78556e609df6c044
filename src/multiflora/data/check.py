"""Whether data fit the model, found out before the work: ids that it has embeddings for, and room for their length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from multiflora.errors import ConfigError, DataError
from multiflora.suggest import did_you_mean
from multiflora.tasks.kind import facts_of
from multiflora.tasks.spec import FilesSource, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

    from multiflora.recipe import Recipe

__all__ = ["check_answers", "check_ids", "check_tasks", "context_length", "largest_id"]


def context_length(config: Any) -> int | None:
    """How many tokens a model reads and writes together, or None where its config does not say.

    Args:
        config: The model's transformers config.

    Example:
        >>> from transformers import GPT2Config
        >>> context_length(GPT2Config(n_positions=128))
        128
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and int(length) > 0 else None


def check_answers(recipe: Recipe, room: int) -> None:
    """Refuse generated answers that alone would fill the model's context.

    Args:
        recipe: Its tasks and ``evaluate`` are read.
        room: Tokens that the model reads.

    Raises:
        ConfigError: The longest answer of a task leaves no room for a prompt.
    """
    for task in (*recipe.tasks, *recipe.evaluate.extra_tasks):
        longest = task.max_new_tokens or recipe.evaluate.max_new_tokens
        if task.score not in ("choices", "nll") and longest >= room:
            raise ConfigError(
                f"task {task.name} may answer with {longest} tokens (its max_new_tokens, or evaluate.max_new_tokens), "
                f"but the model reads {room} tokens, prompt included. Set it well below that."
            )


def check_tasks(recipe: Recipe) -> None:
    """Refuse tasks that have not what the objective learns from: a score for a text, or a worse completion.

    Args:
        recipe: Its tasks and ``train.objective`` are read.

    Raises:
        ConfigError: A task has no score that one text can have, or no worse completion; or a reward is nobody's.
        DataError: A row has no worse completion; names file and line.
    """
    train = recipe.train
    rewards = {} if train.grpo is None else train.grpo.rewards
    names = [task.name for task in recipe.tasks]
    for name in rewards:
        if name not in names:
            raise ConfigError(f"train.grpo.rewards names {name!r}, no task of this recipe; {did_you_mean(name, names)}")
    for task in recipe.tasks:
        if train.objective == "grpo" and task.name not in rewards and task.score in ("nll", "rouge"):
            raise ConfigError(
                f"train.objective is grpo, but task {task.name} has score {task.score!r}, which says of no single text "
                "whether it is right. Set its score to exact, number, verifier or choices (a text then has to be the "
                f"right choice), name a function in train.grpo.rewards ({task.name}: module:function), or leave the "
                "task out."
            )
        if train.objective == "dpo" and task.rejected is None:
            _refuse_without_rejected(task)


def _refuse_without_rejected(task: TaskSpec) -> None:
    facts = facts_of(task.source, task.keep) if isinstance(task.source, FilesSource) else None
    if facts is not None and {"rejected"} <= facts.with_column.keys() & facts.without_column.keys():
        raise DataError(
            f"{facts.without_column['rejected']} has no 'rejected', but {facts.with_column['rejected']} has; "
            "train.objective is dpo, which needs a worse completion in every row. Complete the row, or leave it out "
            "with 'keep', e.g. keep: rejected."
        )
    place = "" if facts is None else f" ({next(iter(facts.without_column.values()), '')})"
    raise ConfigError(
        f"train.objective is dpo, but the rows of task {task.name} have no worse completion{place}. Give them the "
        'columns prompt, chosen and rejected, or write the template: rejected: " {{ worse }}".'
    )


def check_ids(ids: Iterable[int], size: int, where: str) -> None:
    """Refuse ids that the model has no embedding for; it would fail on them in the middle of the work.

    Args:
        ids: Token ids.
        size: Rows of the model's embedding.
        where: What they belong to, for the message.

    Raises:
        DataError: One is too large.
    """
    largest = max(ids, default=0)
    if largest >= size:
        raise DataError(
            f"{where}: the tokenizer makes the id {largest:,}, but the model has embeddings for {size:,} only, 0 to "
            f"{size - 1:,}. Tokenizer and model do not belong together: take the model's own tokenizer, or resize the "
            "model's embeddings (model.resize_token_embeddings) and save it anew."
        )


def largest_id(dataset: Dataset) -> list[int]:
    """The largest token id of encoded examples, in a list; none where there are no examples.

    Args:
        dataset: Has the column ``input_ids``.
    """
    import pyarrow.compute as pc  # type: ignore[import-untyped]  # comes with datasets

    found = pc.max(pc.list_flatten(dataset.with_format("arrow")["input_ids"][:])).as_py() if len(dataset) else None
    return [] if found is None else [int(found)]
