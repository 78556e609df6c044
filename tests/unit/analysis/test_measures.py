"""Measures of whole adapters, as plain values."""

from __future__ import annotations

import pytest
import torch

from multiflora.analysis.measures import similarity
from multiflora.analysis.updates import Update

LAYERS = ["model.layers.0.q_proj", "model.layers.1.q_proj"]


def update(rank: int, seed: int, d: int = 20) -> Update:
    draw = torch.Generator().manual_seed(seed)
    return Update(torch.randn(d, rank, generator=draw), torch.randn(rank, d, generator=draw))


def test_an_update_is_like_itself_whatever_its_rank():
    for rank in (1, 3, 12):
        own = {name: update(rank, k) for k, name in enumerate(LAYERS)}
        found = similarity(own, own)
        assert found["layers"] == 2
        assert len(found["phi"]) == min(rank, 8)
        assert [found["phi"][i][i] for i in range(min(rank, 8))] == pytest.approx([1.0] * min(rank, 8))
        assert found["by_layer"][LAYERS[1]] == {"layer": 1, "module": "q_proj", "phi": pytest.approx(1.0)}
        assert found["chance"] == pytest.approx(min(rank, 8) / 20)


def test_as_many_directions_as_both_have():
    """A small rank against full fine-tuning: the directions of the small one are looked for in the other."""
    ours = {LAYERS[0]: update(2, 0)}
    dense = {LAYERS[0]: Update(ours[LAYERS[0]].B @ ours[LAYERS[0]].A, None)}
    found = similarity(ours, dense)
    assert len(found["phi"]) == 2
    assert found["phi"][1][1] == pytest.approx(1.0)


def test_layers_of_one_alone_and_updates_of_nothing_are_left_out():
    nothing = Update(torch.zeros(20, 2), torch.zeros(2, 20))
    ours = {LAYERS[0]: update(3, 0), LAYERS[1]: nothing}
    assert similarity(ours, {LAYERS[0]: update(3, 1), LAYERS[1]: update(3, 2)})["layers"] == 1
    assert similarity({LAYERS[1]: nothing}, {LAYERS[1]: nothing}) == {
        "layers": 0,
        "phi": [],
        "chance": None,
        "by_layer": {},
    }
    assert similarity(ours, {})["layers"] == 0
