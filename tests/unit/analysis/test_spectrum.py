"""Spectra of low-rank updates: exact against the dense decomposition, and measures with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from multiflora.analysis.spectrum import (
    chance_similarity,
    cumulative_energy,
    low_rank_svd,
    measure,
    subspace_similarity,
)


def factors(d_out: int, k: int, d_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, k, generator=draw), torch.randn(k, d_in, generator=draw)


@pytest.mark.parametrize(("d_out", "k", "d_in"), [(30, 4, 20), (5, 12, 20), (30, 12, 5), (7, 1, 1), (6, 6, 6)])
def test_the_low_rank_decomposition_is_the_dense_one(d_out, k, d_in):
    B, A = factors(d_out, k, d_in)
    U, S, V = low_rank_svd(B, A)
    dense = torch.linalg.svdvals(B.double() @ A.double())
    assert len(S) == min(d_out, k, d_in)
    assert torch.allclose(S, dense[: len(S)], atol=1e-12)
    assert torch.allclose(U @ torch.diag(S) @ V.t(), B.double() @ A.double(), atol=1e-12)
    eye = torch.eye(len(S), dtype=torch.float64)
    assert torch.allclose(U.t() @ U, eye)
    assert torch.allclose(V.t() @ V, eye)


def test_measures_of_known_spectra():
    flat, single = measure(torch.ones(8)), measure(torch.tensor([3.0, 0.0, 0.0]))
    assert flat.effective_rank == pytest.approx(8)
    assert (flat.stable_rank, flat.top_share, flat.entropy) == pytest.approx((8, 1 / 8, 1))
    assert single == pytest.approx((3.0, 1.0, 0.0, 1.0, 1.0))
    halves = measure(torch.tensor([2.0, 1.0]))
    p = (2 / 3, 1 / 3)
    assert halves.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert (halves.top_share, halves.stable_rank, halves.norm) == pytest.approx((0.8, 1.25, 5**0.5))


def test_measures_do_not_depend_on_size():
    singular = torch.tensor([5.0, 2.0, 1.0])
    assert measure(singular)[1:] == pytest.approx(measure(100 * singular)[1:])


def test_an_update_of_nothing():
    assert measure(torch.zeros(4)) == (0, 0, 0, 0, 0)
    assert cumulative_energy(torch.zeros(3)).tolist() == [1, 1, 1]
    assert measure(torch.tensor([2.0])).entropy == 1


def test_energy_rises_to_one():
    energy = cumulative_energy(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert energy.tolist() == pytest.approx([9 / 14, 13 / 14, 1.0])


def basis(d: int, m: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, m, generator=torch.Generator().manual_seed(seed)).double())[0]


def test_a_subspace_is_like_itself():
    U = basis(20, 6, 0)
    phi = subspace_similarity(U, U)
    assert torch.allclose(phi, torch.ones(6, 6, dtype=torch.float64))


def test_similarity_by_its_definition_and_swapped():
    U, V = basis(12, 4, 1), basis(12, 5, 2)
    phi = subspace_similarity(U, V)
    for i in range(4):
        for j in range(5):
            expected = (U[:, : i + 1].t() @ V[:, : j + 1]).norm() ** 2 / min(i + 1, j + 1)
            assert phi[i, j] == pytest.approx(float(expected))
    assert torch.allclose(subspace_similarity(V, U), phi.t())


def test_random_subspaces_are_as_alike_as_chance_has_it():
    found = torch.stack([subspace_similarity(basis(50, 8, s), basis(50, 8, s + 1000)) for s in range(200)]).mean(0)
    for i, j in ((1, 1), (4, 8), (8, 8)):
        assert found[i - 1, j - 1] == pytest.approx(chance_similarity(i, j, 50), rel=0.15)
