"""The loss: next-token cross-entropy at the labelled positions only, weighted by token, and kept apart by task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiflora.data.encode import IGNORED

__all__ = ["behind", "loss_by_task", "predicted_positions", "project_only", "token_losses"]


def predicted_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the model must predict a labelled token: one position before it.

    Args:
        labels: (B, T) ids, -100 where there is no loss.
    Returns:
        Positions (n,) in the batch flattened to B × T, and the ids (n,) to predict there.
    Example:
        >>> predicted_positions(torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]]))
        (tensor([1, 2, 4]), tensor([7, 8, 5]))
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    positions = (shifted != IGNORED).nonzero().squeeze(1)
    return positions, shifted[positions]


def behind(positions: Tensor, length: int, front: int) -> Tensor:
    """Move positions in a batch of rows to where they lie once each row has more tokens in front.

    Args:
        positions: (n,) positions in the batch flattened to B × length.
        length: Tokens of a row.
        front: Tokens that come before each row: a learned prompt.
    Example:
        >>> behind(torch.tensor([0, 2, 4]), length=3, front=5)
        tensor([ 5,  7, 14])
    """
    rows = torch.div(positions, length, rounding_mode="floor")
    return positions + (rows + 1) * front if front else positions


@contextmanager
def project_only(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the language-model head see these positions only, as one (n, d) matrix; its output is (n, vocabulary).

    With short completions the head is a large part of a small model's work, nearly all of it for positions
    without loss. ``logits_to_keep`` is no way out: on a batch it slices a tensor that is no longer
    contiguous, and a frozen head then takes the batched product, which copies its weight once per row.

    Args:
        head: The output embeddings of a causal language model.
        positions: (n,) positions in the batch flattened to B × T.
    """

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), *rest

    hook = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token in nats, in float32 whatever the type of the logits.

    Args:
        logits: (n, vocabulary).
        targets: (n,) ids.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def loss_by_task(losses: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    """Sum losses and count tokens per task, on the losses' device, for a mean that is taken later.

    Args:
        losses: (n,) nats.
        tasks: (n,) numbers of tasks.
        num_tasks: How many there are.
    Returns:
        (2, num_tasks): sums in nats, and counts of tokens.
    Example:
        >>> loss_by_task(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0]), num_tasks=2)
        tensor([[5., 2.],
                [2., 1.]])
    """
    both = torch.stack([losses, torch.ones_like(losses)])
    return torch.zeros(2, num_tasks, device=losses.device).index_add(1, tasks, both)
