"""A step's numbers: finite or not, and whose fault it is."""

from __future__ import annotations

import pytest
import torch

from multiflora.training.finite import StepNumbers, gradients_finite

BAD = [float("nan"), float("inf"), -float("inf")]


def step(losses: list[list[float]], examples: list[list[int]]) -> StepNumbers:
    numbers = StepNumbers(1)
    for nats, of in zip(losses, examples, strict=True):
        numbers.add(torch.tensor(nats), torch.tensor(of, dtype=torch.long))
    return numbers


def test_sound_numbers_are_finite() -> None:
    assert step([[1.0, 2.0], [], [0.5]], [[0, 1], [], [2]]).are_finite()
    assert StepNumbers(1).are_finite()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_names_its_examples_and_no_others(bad: float) -> None:
    numbers = step([[1.0, bad, 2.0], [bad, 0.5]], [[7, 3, 7], [9, 8]])
    assert not numbers.are_finite()
    assert numbers.suspects() == ([3, 9], True)


def test_bad_gradients_alone_name_the_whole_step() -> None:
    numbers = step([[1.0], [2.0, 2.0]], [[4], [5, 5]])
    numbers.gradients = torch.tensor(False)
    assert not numbers.are_finite()
    assert numbers.suspects() == ([4, 5], False)


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_element_of_one_gradient_is_found(bad: float) -> None:
    weights = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    assert gradients_finite(weights) is None
    for weight in weights[1:]:
        weight.grad = torch.ones(2, 3)
    assert gradients_finite(weights)
    weights[2].grad[1, 2] = bad  # type: ignore[index]
    assert not gradients_finite(weights)


def test_a_process_without_a_batch_finds_nothing_bad() -> None:
    numbers = StepNumbers(1)
    assert numbers.are_finite()
    assert numbers.suspects() == ([], False)
    numbers.gradients = torch.tensor(False)
    assert not numbers.are_finite()
