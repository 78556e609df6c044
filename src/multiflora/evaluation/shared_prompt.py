"""Log-likelihoods of several continuations of one prompt, which the model reads once.

The choices of a question share their prompt, and it is nearly all of the work: six choices of three tokens behind a
prompt of fifty are 318 tokens one by one, and 68 where the prompt's keys and values are kept for all of them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multiflora.kept_rows import base_of, has_rows, is_recurrent, rows_of

__all__ = ["Choice", "by_prompt", "score_behind"]

Choice = tuple[int, list[int]]
"""A continuation: where its request stands, and its ids."""

SAVED = 100
"""Tokens that a prompt must save: with less, the second pass and the copies of keys and values cost as much."""
TOKENS = 16
"""Tokens of continuations in a forward pass, for each of its prompts: many short ones cost little more than one."""


def by_prompt(
    requests: Sequence[tuple[Any, list[int], list[int]]], max_length: int, *, least: int = SAVED
) -> dict[tuple[int, ...], list[Choice]]:
    """Find the prompts that several continuations follow, where reading them once saves work.

    A continuation of one token needs no row of its own anyway, and what does not fit into the context is cut, so that
    it begins elsewhere.

    Args:
        requests: (the texts, the prompt's ids, the continuation's ids).
        max_length: The model's context, in tokens.
        least: Tokens that a prompt must save.

    Example:
        >>> by_prompt([("", [1, 2], [3, 4]), ("", [1, 2], [5, 4]), ("", [1], [3, 4])], max_length=8, least=2)
        {(1, 2): [(0, [3, 4]), (1, [5, 4])]}
    """
    found: dict[tuple[int, ...], list[Choice]] = defaultdict(list)
    for i, (_, prompt, wanted) in enumerate(requests):
        if len(prompt) + len(wanted) - 1 <= max_length:
            found[tuple(prompt)].append((i, wanted))
    # those of one token share a row in the ordinary way, too
    rows = {
        p: sum(len(w) > 1 for _, w in choices) + any(len(w) == 1 for _, w in choices) for p, choices in found.items()
    }
    return {p: choices for p, choices in found.items() if (rows[p] - 1) * len(p) >= least}


def score_behind(
    model: Any, prompts: dict[tuple[int, ...], list[Choice]], size: int, pad: int, on_answer: Callable[[], None]
) -> dict[int, tuple[float, bool]] | None:
    """Score continuations behind their prompts.

    Args:
        model: A causal language model.
        prompts: As `by_prompt` gives them.
        size: Prompts of a forward pass.
        pad: Id that fills a row up.
        on_answer: Called for each that is done.

    Returns:
        Of each request log p(continuation | prompt) = sum over t of log p(y_t | x, y_<t), in nats, and whether each of
        its tokens is the likeliest; None for a model that keeps something else of a text, as recurrent ones do.
    """
    found: dict[int, tuple[float, bool]] = {}
    if is_recurrent(model):
        return None
    takes_positions = "position_ids" in inspect.signature(base_of(model).forward).parameters
    # the longest first, as rows of like length waste least
    order = sorted(prompts, key=lambda prompt: (-len(prompt), prompt))
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        lengths = torch.tensor([len(prompt) for prompt in chunk], device=model.device)
        ids, mask = _padded(chunk, pad, model.device, on_the_left=True)
        words = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions else {}
        with torch.no_grad():
            read = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **words)
        if not has_rows(getattr(read, "past_key_values", None)):
            return None
        first = read.logits[:, -1]
        rows = [(row, *choice) for row, prompt in enumerate(chunk) for choice in prompts[prompt]]
        for some in _chunks(sorted(rows, key=lambda row: -len(row[2])), size):
            of = torch.tensor([row for row, _, _ in some], device=model.device)
            logits = first[of].unsqueeze(1)
            inner = [wanted[:-1] for _, _, wanted in some]
            if inner[0]:
                ids, own = _padded(inner, pad, model.device)
                # what fills a row up needs a position too, and the model may have none behind the row's last
                steps = torch.minimum(own.cumsum(-1) - 1, own.sum(-1, keepdim=True) - 1).clamp(min=0)
                words = {"position_ids": lengths[of].unsqueeze(1) + steps} if takes_positions else {}
                kept, seen = rows_of(read.past_key_values, of), torch.cat([mask[of], own], 1)
                with torch.no_grad():
                    behind = model(input_ids=ids, attention_mask=seen, past_key_values=kept, use_cache=True, **words)
                logits = torch.cat([logits, behind.logits], 1)
            for (_, request, wanted), scores in zip(some, logits, strict=True):
                found[request] = _score(scores[: len(wanted)], wanted)
                on_answer()
    return found


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any, on_the_left: bool = False) -> tuple[Tensor, Tensor]:
    """(rows, width) ids of rows filled up to the longest, and their mask."""
    width = max(map(len, rows))
    filled = [(list(row), width - len(row)) for row in rows]
    ids = [[pad] * more + row if on_the_left else row + [pad] * more for row, more in filled]
    mask = [[0] * more + [1] * len(row) if on_the_left else [1] * len(row) + [0] * more for row, more in filled]
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask, dtype=torch.long, device=device)


def _score(logits: Tensor, wanted: list[int]) -> tuple[float, bool]:
    """From (T, V) logits: the log-probability of T tokens in float32, and whether each is the likeliest."""
    targets = torch.tensor(wanted, device=logits.device)
    found = logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1))
    return float(found.sum()), bool((logits.argmax(-1) == targets).all())


def _chunks(rows: list[tuple[int, int, list[int]]], size: int) -> Iterator[list[tuple[int, int, list[int]]]]:
    """Cut rows, the longest first, into what one forward pass takes."""
    start = 0
    while start < len(rows):
        end = start + max(size, TOKENS * size // len(rows[start][2]))
        yield rows[start:end]
        start = end
