"""LoraHub's composition and objective against plain loops written from its paper, in float64."""

from __future__ import annotations

import pytest
import torch

from multiflora.export.lorahub import BOUND, blend, penalised


def test_both_factors_are_weighted_so_the_product_has_cross_terms():
    torch.manual_seed(0)
    loras = [(torch.randn(2, 7, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)) for _ in range(3)]
    weights = [0.5, -1.25, 1.5]
    (made,) = blend({"lin": (torch.stack([A for A, _ in loras]), torch.stack([B for _, B in loras]))}, weights)
    update = torch.zeros(5, 7, dtype=torch.float64)
    for w, (_, B) in zip(weights, loras, strict=True):
        for v, (A, _) in zip(weights, loras, strict=True):
            update += w * v * B @ A
    assert (made.B @ made.A - update).abs().max() < 1e-12
    own = sum(w * B @ A for w, (A, B) in zip(weights, loras, strict=True))
    assert (made.B @ made.A - own).abs().max() > 0.1  # it is not the weighted sum of the updates


def test_the_update_is_quadratic_in_the_weights_and_zero_at_the_start():
    torch.manual_seed(0)
    stacked = {"lin": (torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64))}
    (zero,), (once,), (twice,) = (blend(stacked, [w, -w]) for w in (0.0, 0.6, 1.2))
    assert not (zero.B @ zero.A).any()
    assert torch.allclose(twice.B @ twice.A, 4 * (once.B @ once.A), atol=1e-12)


def test_the_objective():
    assert penalised(2.0, [1.5, -0.5, 0.0, 1.0]) == pytest.approx(2.0 + 0.05 * (1.5 + 0.5 + 0 + 1) / 4)
    assert BOUND == 1.5
