"""Masks come back from their seed, drop what they should and are unbiased."""

from __future__ import annotations

import pytest
import torch

from multiflora.ops import draw_seed, dropout_mask
from multiflora.ops.mask import kept, kept_by_block


def test_the_seed_brings_the_mask_back():
    first, again, other = (dropout_mask((64, 5, 8), 0.3, seed) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_mean(p):
    mask = dropout_mask((200_000,), p, 1, dtype=torch.float64)
    dropped = (mask == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / 200_000) ** 0.5)
    assert mask.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (7, 1)])
def test_degenerate_shapes(shape):
    assert dropout_mask(shape, 0.5, 0).shape == shape


def test_heads_and_neighbours_are_independent():
    mask = (dropout_mask((50_000, 4), 0.5, 3) > 0).double()
    correlation = torch.corrcoef(torch.cat((mask, mask.roll(1, 0)), 1).t()) - torch.eye(8)
    assert correlation.abs().max() < 5 / 50_000**0.5


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 5), (11, 6)])
def test_a_mask_in_blocks_is_the_mask(shape):
    blocks = list(kept_by_block(shape, 0.4, 7, 4, dtype=torch.int32))
    assert [len(block) for block in blocks[:-1]] == [4] * (len(blocks) - 1)
    assert torch.equal(
        torch.cat([torch.empty(0, shape[1], dtype=torch.int32), *blocks]), kept(shape, 0.4, 7, dtype=torch.int32)
    )


def test_torch_manual_seed_decides():
    torch.manual_seed(1)
    first = [draw_seed(), draw_seed()]
    torch.manual_seed(1)
    assert first == [draw_seed(), draw_seed()]
    assert first[0] != first[1]
