"""The loss at labelled positions equals the loss over all logits, and is told apart by task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multiflora.training.losses import behind, loss_by_task, predicted_positions, project_only, token_losses


def test_positions_are_one_before_their_labels_and_stay_in_their_row() -> None:
    labels = torch.tensor([[9, -100, 3], [4, -100, -100], [-100, 5, 6]])
    positions, targets = predicted_positions(labels)
    assert positions.tolist() == [1, 6, 7]  # the labels in a row's first column have nothing before them
    assert targets.tolist() == [3, 5, 6]


def test_no_labels_give_no_positions_and_a_loss_one_can_go_back_through() -> None:
    positions, targets = predicted_positions(torch.full((2, 3), -100))
    logits = torch.randn(2 * 3, 7, requires_grad=True)
    token_losses(logits[positions], targets).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_the_head_sees_the_positions_as_one_matrix_and_only_within_the_block() -> None:
    head, hidden = nn.Linear(4, 6), torch.randn(2, 3, 4)
    with project_only(head, torch.tensor([1, 5])):
        some = head(hidden)
    torch.testing.assert_close(some, head(hidden).reshape(6, 6)[[1, 5]])
    assert head(hidden).shape == (2, 3, 6)


def test_the_hook_is_gone_after_an_error() -> None:
    head = nn.Linear(4, 6)
    with pytest.raises(IndexError, match="out of range"), project_only(head, torch.tensor([99])):
        head(torch.randn(2, 3, 4))
    assert head(torch.randn(2, 3, 4)).shape == (2, 3, 6)


def test_losses_are_in_float32_for_half_precision_logits() -> None:
    logits, targets = torch.randn(5, 11).bfloat16(), torch.arange(5)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), targets, reduction="none"))


def test_sums_and_counts_belong_to_their_task() -> None:
    sums = loss_by_task(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0]), num_tasks=4)
    assert sums.tolist() == [[10.0, 0.0, 5.0, 0.0], [2.0, 0.0, 2.0, 0.0]]


def test_positions_behind_a_learned_prompt() -> None:
    positions = torch.tensor([0, 2, 4, 8])
    assert behind(positions, length=3, front=5).tolist() == [5, 7, 14, 23]
    assert behind(positions, length=3, front=0).tolist() == [0, 2, 4, 8]
