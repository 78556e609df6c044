"""Heads: cosines, norms and their layout, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multiflora.analysis.heads import head_cosine, head_norms, head_points


def test_cosine_is_the_mean_over_pairs():
    heads = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[2.0], [2.0]]])
    assert head_cosine(heads) == pytest.approx((0 + 2 * 0.5**0.5) / 3)


def test_cosine_of_equal_and_of_opposite_heads():
    head = torch.randn(5, 3)
    assert head_cosine(torch.stack((head, 3 * head))) == pytest.approx(1)
    assert head_cosine(torch.stack((head, -head))) == pytest.approx(-1)


def test_nothing_is_said_of_one_head_or_of_none_that_is_trained():
    assert head_cosine(torch.randn(1, 4, 2)) is None
    assert head_cosine(torch.zeros(3, 4, 2)) is None


def test_a_zero_head_has_no_direction():
    assert head_cosine(torch.stack((torch.ones(4, 2), torch.zeros(4, 2)))) == 0


def test_norms_show_what_cosines_hide():
    head = torch.randn(5, 3)
    assert head_norms(torch.stack((head, 1000 * head))) == pytest.approx(
        [float(head.norm()), 1000 * float(head.norm())]
    )


def test_the_layout_keeps_groups_together_and_repeats_itself():
    draw = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(2, 8, 2, generator=draw)
    heads = [centres[i % 2] + 0.1 * torch.randn(8, 2, generator=draw) for i in range(20)]
    points = head_points(heads)
    assert np.array_equal(points, head_points(heads))
    own, other = points[0::2], points[1::2]
    between = np.linalg.norm(own.mean(0) - other.mean(0))
    assert between > max(
        np.linalg.norm(own - own.mean(0), axis=1).mean(), np.linalg.norm(other - other.mean(0), axis=1).mean()
    )


def test_a_few_heads_are_not_laid_out():
    assert head_points([torch.ones(2, 2)] * 4) is None
    assert head_points([torch.ones(2, 2)] * 9) is None
