"""A profile names what a run does."""

from __future__ import annotations

import torch

from multiflora.bench.profile import profile

CPU = torch.device("cpu")


def test_products_by_their_shapes_and_the_largest_first():
    x, small = torch.ones(300, 400), torch.ones(4, 4)

    def run():
        y = torch.ones(300, 300).addmm_(x, x.t())
        torch.mm(small, x[:4], out=torch.ones(4, 400))
        return y.sum() + (small @ small).sum()

    run()
    seen = profile(run, CPU)
    assert next(iter(seen)) == "aten::addmm_ 300×400 · 400×300"
    assert "aten::mm 4×4 · 4×4" in seen
    assert "aten::mm 4×4 · 4×400" in seen  # not the place it is written to
    assert list(seen.values()) == sorted(seen.values(), reverse=True)
    assert len(profile(run, CPU, keep=2)) == 2
