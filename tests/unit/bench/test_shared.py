"""Stacked stems give what separate ones give, gradients included."""

from __future__ import annotations

import torch

from multiflora.bench.shapes import Shape
from multiflora.bench.shared import Stems, apart, measure_shared, together


def test_both_ways_compute_the_same():
    torch.manual_seed(0)
    x = torch.randn(7, 12, dtype=torch.float64)
    weights = [torch.randn(d_out, 12, dtype=torch.float64) for d_out in (12, 4)]
    made = [Stems(*(torch.randn(rows, 12, dtype=torch.float64) for rows in (3, 2, 3))) for _ in weights]
    found = []
    for way in (apart, together):
        leaf = x.clone().requires_grad_()
        stems = [Stems(A.clone().requires_grad_(), router.clone().requires_grad_(), A0) for A, router, A0 in made]
        outputs = way(leaf, weights, stems)
        sum((i + 1) * (part**2).sum() for i, part in enumerate(outputs)).backward()
        found.append([*outputs, leaf.grad, *(part.grad for own in stems for part in own[:2])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_case_has_both_and_both_passes():
    layers = (Shape("m", "q", 12, 12), Shape("m", "k", 12, 4))
    case = measure_shared(layers, tokens=5, dtype=torch.float32, rounds=2, device=torch.device("cpu"))
    assert {name: set(phases) for name, phases in case.seconds.items()} == {
        "apart": {"forward", "backward"},
        "together": {"forward", "backward"},
    }
    assert case.name == "m q 12→12 + k 12→4, 5 tokens, float32"
