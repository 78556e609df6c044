"""Answers of a batch whose finished rows leave it.

``generate`` runs a batch until its longest answer ends, and computes every row until then. Here it stops whenever half
of the rows are finished, and goes on with the others behind the keys and values that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from multiflora.kept_rows import base_of, has_rows, is_recurrent, rows_of
from multiflora.tasks.score import before_stop

__all__ = ["RowStops", "generate_leaving", "may_leave"]

# settings of a model's own that count from where a call of ``generate`` begins, or keep something else of a text
_COUNT_FROM_THE_PROMPT = (
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "begin_suppress_tokens",
    "cache_implementation",
)


class RowStops(StoppingCriteria):
    """Finish each row whose answer holds one of the stops; white space before an answer is none, see `before_stop`.

    The harness's own criterion waits until one stop has come up in every row, so one row that ends in another way
    keeps the whole batch running to its longest.

    Args:
        stops: The texts.
        tokenizer: Turns ids into text.
        prompt_length: Ids of the prompt, padding included.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any, prompt_length: int) -> None:
        self.stops = list(stops)
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say of each row, (rows,), whether it is finished."""
        if not self.stops:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        done = [before_stop(text, self.stops) != text for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


class _HalfDone(StoppingCriteria):
    """End a call when half of its rows have ended: by their stops, or by an end-of-text id."""

    def __init__(self, stops: RowStops, ends: Sequence[int]) -> None:
        self.stops, self.ends = stops, list(ends)
        self.done = torch.empty(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answers = input_ids[:, self.stops.prompt_length :]
        ended = torch.isin(answers, answers.new_tensor(self.ends)).any(1)
        self.done = self.stops(input_ids, scores) | ended
        return self.done | bool(2 * self.done.sum() >= len(self.done))


def may_leave(model: Any) -> bool:
    """Whether a model's rows can go on in a smaller batch."""
    own = getattr(base_of(model), "generation_config", None)  # a model that only scores has none
    words = own is not None and all(getattr(own, name, None) is None for name in _COUNT_FROM_THE_PROMPT)
    return words and not is_recurrent(model)


def generate_leaving(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    stops: RowStops,
    max_length: int,
    pad: int,
    cache: DynamicCache | None = None,
    within: Callable[[Tensor], AbstractContextManager[Any]] = lambda rows: nullcontext(),
    **settings: Any,
) -> Tensor:
    """Generate as ``generate`` does.

    Args:
        model: A causal language model for which `may_leave` holds.
        ids: (B, T) ids of the prompts, padded on the left.
        mask: (B, T), 0 for padding.
        stops: When a row is finished.
        max_length: Ids of the longest answer, its prompt included.
        pad: Id behind an answer that is finished.
        cache: Keys and values of all but the prompts' last ids, where they have been read.
        within: Gives what a call of ``generate`` stands in, for the rows that it is of, (rows,).
        settings: For transformers' ``generate``.

    Returns:
        (B, T + new) ids, the prompts' own first.
    """
    found = ids.new_full((len(ids), max_length), pad)
    found[:, : ids.shape[1]] = ids
    left = torch.arange(len(ids), device=ids.device)
    while len(left):
        half = _HalfDone(stops, _ends(model))
        with within(left):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_length=max_length,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([half]),
                return_dict_in_generate=True,
                **settings,
            )
        ids = out.sequences
        found[left, : ids.shape[1]] = ids
        going_on = (~half.done).nonzero().flatten()
        if ids.shape[1] >= max_length or not len(going_on):
            break
        made = ids.shape[1] - mask.shape[1]
        left, ids = left[going_on], ids[going_on]
        mask = torch.cat([mask[going_on], mask.new_ones(len(going_on), made)], 1)
        # without keys and values of its own, what was written is read again
        cache = rows_of(out.past_key_values, going_on) if has_rows(out.past_key_values) else None
    return found[:, : ids.shape[1]]


def _ends(model: Any) -> list[int]:
    """The ids that end an answer."""
    ends = base_of(model).generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
