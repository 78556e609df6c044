"""Products of thin matrices: stacked exactly, cut as the SVD of the wide product would cut them."""

from __future__ import annotations

import pytest
import torch

from multiflora.export.low_rank import stack, truncate, truncate_for


def thin(k, d_in=13, d_out=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(k, d_in, **draw), torch.randn(d_out, k, **draw)


def test_stacked_factors_give_the_sum_of_the_products():
    pairs = [thin(2), thin(1, seed=1), thin(3, seed=2)]
    A, B = stack(pairs)
    assert A.shape == (6, 13)
    assert torch.allclose(B @ A, sum(b @ a for a, b in pairs), atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, 20], ids=["one", "thin", "wider than the matrix"])
@pytest.mark.parametrize("rank", [1, 3])
def test_cut_is_the_svd_of_the_wide_product(k, rank):
    A, B = thin(k)
    u, s, vh = torch.linalg.svd(B @ A)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    small_A, small_B, lost = truncate(A, B, rank)
    assert small_A.shape[0] == small_B.shape[1] == min(rank, k, 9)
    assert torch.allclose(small_B @ small_A, best, atol=1e-10)
    assert lost == pytest.approx(float(s[rank:].square().sum() / s.square().sum()), abs=1e-12)


def test_cut_to_more_than_there_is_loses_nothing():
    A, B = thin(3)
    small_A, small_B, lost = truncate(A, B, 99)
    assert lost == 0
    assert torch.allclose(small_B @ small_A, B @ A, atol=1e-12)


def test_a_product_of_zeros_is_cut_without_dividing_by_its_energy():
    A, B = thin(3)
    small_A, small_B, lost = truncate(A, B * 0, 1)
    assert lost == 0
    assert not (small_B @ small_A).any()


@pytest.mark.parametrize("seen", [40, 2], ids=["all directions", "fewer inputs than directions"])
def test_cut_for_inputs_beats_the_plain_cut_on_them(seen):
    A, B = thin(5)
    stretch = torch.diag(torch.tensor([10.0, 1, 1, 1, 0.1], dtype=torch.float64))
    hidden = torch.randn(seen, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) @ stretch
    x = torch.linalg.lstsq(A, hidden.t()).solution.t()
    small_A, small_B, lost = truncate_for(A, B, 2, hidden.t() @ hidden / seen)
    plain_A, plain_B, _ = truncate(A, B, 2)
    y = x @ A.t() @ B.t()
    off = (x @ small_A.t() @ small_B.t() - y).norm()
    assert small_A.shape[0] == 2
    assert off < (x @ plain_A.t() @ plain_B.t() - y).norm()
    assert lost == pytest.approx(float((off / y.norm()) ** 2), abs=1e-6)
