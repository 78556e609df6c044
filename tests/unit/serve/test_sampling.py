"""A row is drawn from its own softmax, by its own seed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from multiflora.serve.sampling import keep_top, perturbed


def rule(temperature=1.0, top_p=1.0, seed=0):
    return SimpleNamespace(temperature=temperature, top_p=top_p, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_draws_have_the_distribution_that_is_asked_for(temperature, top_p):
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    wanted = keep_top(logits / temperature, top_p).softmax(-1)
    asked = rule(temperature, top_p)
    draws = torch.tensor([int(perturbed(logits, asked).argmax()) for _ in range(4000)])
    found = torch.bincount(draws, minlength=3) / len(draws)
    assert (found - wanted).abs().max() < 0.03  # four standard errors


def test_top_p_keeps_the_token_that_crosses_it_and_always_one():
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert keep_top(logits, 0.6).isfinite().tolist() == [False, True, False]
    assert keep_top(logits, 0.61).isfinite().tolist() == [False, True, True]
    assert keep_top(logits, 1e-9).isfinite().tolist() == [False, True, False]


def test_rows_of_a_batch_do_not_share_their_randomness():
    logits = torch.zeros(3, 50)
    alone = [perturbed(logits[0], rule(seed=7)).argmax()]
    rules = [rule(seed=1), rule(seed=7), rule(temperature=0)]
    together = [perturbed(row, own).argmax() for row, own in zip(logits, rules, strict=True)]
    assert together[1] == alone[0]
    assert together[0] != together[1]
    assert together[2] == 0
