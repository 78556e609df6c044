"""Few-shot prompts: solved examples of the training split before each one that is scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from multiflora.errors import DataError
from multiflora.tasks.example import Example, Message
from multiflora.tasks.load import examples_of
from multiflora.tasks.spec import TaskSpec
from multiflora.tasks.splits import normalised

__all__ = ["BETWEEN", "shown_before", "with_shots"]

BETWEEN = "\n\n"
"""What stands between two examples of a prompt, where there is no chat template."""


def with_shots(spec: TaskSpec, examples: Sequence[Example]) -> list[Example]:
    """Put a task's ``few_shot`` solved training examples before each of the examples that will be scored.

    Which ones follows from the task's ``split_seed`` and the example's name alone: neither a limit nor another order
    changes a prompt.

    Args:
        spec: The task; its training split is read only where it asks for examples.
        examples: The ones to be scored.

    Raises:
        DataError: The training split has too few rows, or there is none.
    """
    if not spec.few_shot:
        return list(examples)
    pool = examples_of(spec, "train")
    return [shown_before(example, _drawn(spec, pool, example)) for example in examples]


def _drawn(spec: TaskSpec, pool: Sequence[Example], example: Example) -> list[Example]:
    """The training examples for one that is scored, in the order to be shown."""
    own = normalised(example.prompt)
    draw = random.Random(f"{spec.split_seed} {example.id}")
    # one more than wanted, as one of them may be the example itself; to go through the whole split each time takes long
    found = draw.sample(pool, min(len(pool), spec.few_shot + 1))
    others = [shot for shot in found if shot.id != example.id and normalised(shot.prompt) != own]
    if len(others) < spec.few_shot:
        others = [shot for shot in pool if shot.id != example.id and normalised(shot.prompt) != own]
        if len(others) < spec.few_shot:
            raise DataError(
                f"task {spec.name} has few_shot: {spec.few_shot}, but its training split has {len(others)} rows "
                f"besides {example.id}. Lower few_shot, or give it more training rows."
            )
        others = draw.sample(others, spec.few_shot)
    return others[: spec.few_shot]


def shown_before(example: Example, shots: Sequence[Example]) -> Example:
    """Return an example whose prompt begins with solved ones: earlier turns of its conversation, where it has one.

    Example:
        >>> ask = Example("sums", "a", "1 + 1 =", " 2")
        >>> shown_before(ask, [Example("sums", "b", "1 + 2 =", " 3")]).prompt
        '1 + 2 = 3\\n\\n1 + 1 ='
    """
    prompt = BETWEEN.join([*(shot.prompt + shot.completion for shot in shots), example.prompt])
    turns = [turn for shot in shots for turn in _turns(shot) if turn.role != "system"]
    own = _turns(example)
    system = [turn for turn in own[:1] if turn.role == "system"]
    return replace(example, prompt=prompt, messages=(*system, *turns, *own[len(system) :]))


def _turns(example: Example) -> tuple[Message, ...]:
    """An example as a conversation, as a chat template reads it."""
    return example.messages or (
        Message("user", example.prompt.strip()),
        Message("assistant", example.completion.strip()),
    )
