"""From a recipe's tasks to the examples of a run, encoded, mixed and in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from multiflora.data.batches import group_by_length
from multiflora.data.check import check_answers, check_ids, check_tasks, context_length, largest_id
from multiflora.data.encode import IGNORED, EncodedTask, encode
from multiflora.data.mixture import Mixture, allocate, task_rates
from multiflora.data.weights import task_weights
from multiflora.errors import ConfigError
from multiflora.once import once
from multiflora.tasks import load_split

if TYPE_CHECKING:
    from multiflora.recipe import Recipe

__all__ = ["Examples", "TrainingData", "encode_tasks", "fill_up", "mix"]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on."""

    dataset: Dataset
    """Encoded examples in the order of training, repeats included."""
    report: dict[str, dict[str, Any]]
    """What it holds of each task, see `Mixture.report`."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """All training examples of a recipe's tasks, each once."""

    store: Dataset
    """Encoded examples, task after task, each with its own number as ``example`` and its row's name as ``id``."""
    mixture: Mixture
    """How they are drawn."""
    rows: dict[str, Dataset]
    """Task -> its rendered rows, those that were too long included."""
    notes: tuple[str, ...]
    """What was left out, a sentence each."""

    def take(self, number: int, *, batch_size: int | None = None, weigh_in: int | None = None) -> TrainingData:
        """Take the first examples of the mixture's stream.

        Args:
            number: How many.
            batch_size: Examples of an optimiser step, to lay those of like length side by side; None: leave the order.
            weigh_in: Examples of an optimiser step, to give each a ``loss_weight`` by which tasks count as they are
                drawn, see `task_weights`; None: no such column.
        """
        plan = self.mixture.plan(number)
        lengths, loss_tokens, tasks = (_column(self.store, name) for name in ("length", "loss_tokens", "task_id"))
        report = self.mixture.report(plan, lengths, loss_tokens)
        if batch_size is not None:
            plan = plan[group_by_length(lengths[plan], batch_size, tasks=tasks[plan], seed=self.mixture.seed)]
        dataset = self.store.select(plan)
        if weigh_in is not None:
            weights = task_weights(tasks[plan], loss_tokens[plan], weigh_in)
            dataset = dataset.add_column("loss_weight", weights)
        return TrainingData(dataset=dataset, report=report)

    def first(self, data: TrainingData, number: int) -> TrainingData:
        """Return the first of the examples in training order: what a run that ended early has read.

        Args:
            data: What `take` gave.
            number: How many.
        """
        read = data.dataset.select(range(min(number, len(data.dataset))))
        lengths, loss_tokens = (_column(self.store, name) for name in ("length", "loss_tokens"))
        return TrainingData(dataset=read, report=self.mixture.report(_column(read, "example"), lengths, loss_tokens))


def fill_up(dataset: Dataset, multiple: int) -> Dataset:
    """Append rows without loss until the length is a multiple of ``multiple``.

    Several processes must take equally many batches of each step. Repeating examples in the last one, as data loaders
    do, would train on them twice; these rows are read and teach nothing.

    Args:
        dataset: Encoded examples.
        multiple: Examples of an optimiser step, of all processes together.
    """
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    shortest = dataset[int(_column(dataset, "length").argmin())]
    row = {**shortest, "labels": [IGNORED] * shortest["length"], "loss_tokens": 0}
    if "example" in row:
        row["example"] = -1  # none of the data's; what is counted over examples leaves it out
    if "loss_weight" in row:
        row["loss_weight"] = 0.0
    return concatenate_datasets([dataset, Dataset.from_list([row] * missing, features=dataset.features)])


def encode_tasks(recipe: Recipe, tokenizer: Any, config: Any = None, *, taken: int = 0) -> Examples:
    """Load the training split of every task of a recipe, encode it and set up the mixture.

    Args:
        recipe: Its ``tasks``, ``mixture``, ``seed``, ``train.max_length`` and ``model.chat_template`` are read.
        tokenizer: The model's tokenizer.
        config: The model's, for what it has room and embeddings for; None: that is not checked.
        taken: Tokens of the model's context that a learned prompt takes.
    Raises:
        DataError: A task's data cannot be read, it has no example that fits, or an id has no embedding.
        ConfigError: The mixture's settings do not go together, or answers would fill the model's context.
    """
    check_tasks(recipe)
    rows, encoded, store = once(
        (*_key(recipe), str(taken), str(config is None)), lambda: _encoded(recipe, tokenizer, config, taken)
    )
    return Examples(
        store=store,
        mixture=mix(recipe, encoded),
        rows=rows,
        notes=tuple(note for task in encoded if (note := task.note())),
    )


def _key(recipe: Recipe) -> tuple[str, ...]:
    """All that a recipe's encoded examples depend on."""
    tasks = (task.model_dump_json() for task in recipe.tasks)
    train = recipe.train
    return ("encoded", recipe.model.model_dump_json(), str(train.max_length), train.objective, *tasks)


def _encoded(
    recipe: Recipe, tokenizer: Any, config: Any, taken: int
) -> tuple[dict[str, Dataset], list[EncodedTask], Dataset]:
    """Every task's rows, rendered; the tasks, encoded; and all their examples in one data set."""
    rows = {task.name: load_split(task, "train") for task in recipe.tasks}
    room = None if config is None else context_length(config)
    longest, limit = recipe.train.max_length, "train.max_length"
    drawn = 0 if recipe.train.grpo is None else recipe.train.grpo.max_completion_length
    if room is not None and taken >= room:
        raise ConfigError(
            f"method.num_virtual_tokens is {taken:,}, but the model reads {room:,} tokens, those included. Set it well "
            "below that."
        )
    if room is not None:
        check_answers(recipe, room - taken)
    if room is not None and room - taken <= drawn:
        raise ConfigError(
            f"train.grpo.max_completion_length is {drawn:,}, but the model reads {room:,} tokens, prompt included. Set "
            "it well below that."
        )
    if room is not None and room - taken - drawn < longest:
        longest, limit = (
            room - taken - drawn,
            f"the model's context{' less train.grpo.max_completion_length' * (drawn > 0)}",
        )
    encoded = [
        encode(
            rows[task.name],
            tokenizer,
            task=task.name,
            task_id=number,
            max_length=longest,
            chat_template=recipe.model.chat_template,
            limit=limit,
            objective=recipe.train.objective,
        )
        for number, task in enumerate(recipe.tasks)
    ]
    if config is not None:
        for task in encoded:
            check_ids(largest_id(task.dataset), config.get_text_config().vocab_size, f"task {task.task}")
    store = concatenate_datasets([task.dataset for task in encoded])
    return rows, encoded, store.add_column("example", np.arange(len(store)))


def mix(recipe: Recipe, encoded: list[EncodedTask]) -> Mixture:
    """Set up the mixture a recipe asks for.

    Args:
        recipe: Its ``mixture``, the tasks' weights and ``seed`` are read.
        encoded: The tasks.
    """
    wanted = recipe.mixture
    sizes = [len(task.dataset) for task in encoded]
    rates = task_rates(
        wanted.strategy,
        sizes,
        weights=[task.weight for task in recipe.tasks],
        temperature=wanted.temperature,
        cap=wanted.cap,
    )
    counted = [min(size, wanted.cap or size) for size in sizes]
    return Mixture(
        names=tuple(task.task for task in encoded),
        sizes=tuple(sizes),
        counts=tuple(allocate(rates, wanted.epoch_size or sum(counted))),
        seed=recipe.seed,
        resample=wanted.resample,
    )


def _column(data: Dataset, name: str) -> Any:
    """Return a column of whole numbers as an array."""
    return np.asarray(data.with_format("numpy")[name][:])
