"""LoSparse against plain loops from its paper, in float64: the split, the schedule, the importance, the rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from multiflora.compress.layer import LoSparseLinear, compressed_layers, sparsify
from multiflora.compress.losparse import Averages, decompose, kept_rank, kept_rows, remaining, update
from multiflora.compress.pruner import Pruner
from multiflora.compress.spec import CompressSpec


def test_the_low_rank_part_is_the_best_of_its_rank_and_the_rest_is_exact():
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    L, R, S = decompose(weight, 2)
    assert (L.shape, R.shape, S.shape) == ((7, 2), (2, 5), (7, 5))
    assert (L @ R + S - weight).abs().max() < 1e-12
    sigma = torch.linalg.svdvals(weight)
    assert torch.linalg.matrix_rank(L @ R) == 2
    assert S.norm() == pytest.approx(float(sigma[2:].norm()))  # Eckart-Young: no other of rank 2 leaves less
    assert torch.allclose((L * L).sum(0), sigma[:2])  # L and R share the singular values
    assert torch.allclose((R * R).sum(1), sigma[:2])


@pytest.mark.parametrize(("share", "d_out", "d_in"), [(0.05, 768, 3072), (0.1, 9, 4), (0.9, 3, 3)])
def test_the_rank_is_the_smallest_that_holds_the_share(share, d_out, d_in):
    k = kept_rank(share, d_out, d_in)
    assert k * (d_out + d_in) >= share * d_out * d_in > (k - 1) * (d_out + d_in)


def test_the_schedule_is_cubic_between_its_ends():
    steps, keep, start, end = 200, 0.15, 0.1, 0.3
    seen = []
    for step in range(1, steps + 1):
        if step <= 20:
            wanted = 1.0
        elif step >= 140:
            wanted = keep
        else:
            wanted = keep + (1 - keep) * math.pow(1 - (step - 20) / 120, 3)
        seen.append(remaining(step, steps, keep=keep, start=start, end=end))
        assert seen[-1] == pytest.approx(wanted, abs=1e-12)
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == (1.0, keep)


def test_importance_is_platons_number_by_number():
    torch.manual_seed(0)
    values, grads = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    averages = Averages(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))
    for value, grad in zip(values, grads, strict=True):
        averages = update(averages, value, grad, beta1=0.85, beta2=0.7)
    for i in range(3):
        total = 0.0
        for j in range(4):
            importance = uncertainty = 0.0
            for value, grad in zip(values, grads, strict=True):
                now = abs(float(value[i, j] * grad[i, j]))
                importance = 0.85 * importance + 0.15 * now
                uncertainty = 0.7 * uncertainty + 0.3 * abs(now - importance)
            total += importance * uncertainty
        assert float(averages.rows()[i]) == pytest.approx(total / 4, rel=1e-12)


def test_with_beta2_of_one_importance_alone_counts():
    torch.manual_seed(0)
    averages = Averages(torch.zeros(3, 4), torch.zeros(3, 4))
    importance = torch.zeros(3, 4)
    for _ in range(5):
        value, grad = torch.randn(3, 4), torch.randn(3, 4)
        averages = update(averages, value, grad, beta1=0.85, beta2=1)
        importance = 0.85 * importance + 0.15 * (value * grad).abs()
    assert torch.allclose(averages.rows(), importance.mean(1))
    assert CompressSpec().beta2 == 1


def test_rows_compete_over_all_layers_by_what_they_hold():
    torch.manual_seed(0)
    scores, widths = [torch.rand(5), torch.rand(3), torch.rand(4)], [8, 2, 3]
    total = 5 * 8 + 3 * 2 + 4 * 3
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        rows = sorted(
            ((float(s), layer, i) for layer, each in enumerate(scores) for i, s in enumerate(each)), reverse=True
        )
        held, wanted = 0, set()
        for _, layer, i in rows:
            held += widths[layer]
            if held > share * total + 1e-6:
                break
            wanted.add((layer, i))
        found = kept_rows(scores, widths, share)
        assert {(layer, i) for layer, kept in enumerate(found) for i in range(len(kept)) if kept[i]} == wanted


class Net(nn.Module):
    """A body and a head, as far as the compression asks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 12, bias=False), nn.Linear(12, 4)

    def get_output_embeddings(self):
        """What is not compressed."""
        return self.head

    def forward(self, x):
        """Three layers."""
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_it_starts_as_the_model_and_ends_with_the_share_that_was_asked_for():
    net = Net()
    torch.manual_seed(1)
    x, y = torch.randn(32, 16), torch.randn(32, 4)
    before = net(x)
    sparsify(net, 0.2)
    layers = compressed_layers(net)
    assert set(layers) == {"first", "second"}
    assert torch.allclose(net(x), before, atol=1e-5)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"first.L", "first.R", "first.S", "first.bias", "second.L", "second.R", "second.S"}
    spec = CompressSpec(low_rank=0.2, keep=0.25, start=0.1, end=0.4, every=5)
    pruner, steps = Pruner(net, spec), 60
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    left, losses = [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        pruner.after(step, steps)
        total = sum(layer.S.numel() for layer in layers.values())
        held = sum(int(layer.S.detach().any(1).sum()) * layer.in_features for layer in layers.values())
        left.append(held / total)
        losses.append(float(loss))
    assert left[5] == 1.0  # nothing is taken before `start`
    for step in (10, 20, 30):
        allowed = remaining(step, steps, keep=0.25, start=0.1, end=0.4)
        assert allowed - 24 / total < left[step - 1] <= allowed
    assert left[-1] <= 0.25
    assert losses[-1] < losses[0]
    assert all(torch.linalg.matrix_rank(layer.L @ layer.R) == layer.L.shape[1] for layer in layers.values())
    kept, size = net(x), sum(p.numel() for p in net.parameters())
    for layer in layers.values():
        layer.slim()
        assert layer.numbers() == sum(p.numel() for p in layer.parameters())
    assert torch.allclose(net(x), kept, atol=1e-6)
    assert sum(p.numel() for p in net.parameters()) < 0.65 * size


def test_a_layer_with_a_few_rows_gives_what_the_whole_one_gives_in_any_shape_and_dtype():
    torch.manual_seed(0)
    layer = LoSparseLinear.of(nn.Linear(6, 9), rank=2)
    with torch.no_grad():
        layer.S[torch.tensor([0, 3, 4, 8])] = 0
    x = torch.randn(2, 3, 6)
    whole = layer(x)
    layer.slim()
    assert layer.rows.tolist() == [1, 2, 5, 6, 7]
    assert torch.allclose(layer(x), whole, atol=1e-6)
    assert torch.allclose(x @ layer.dense().T + layer.bias, whole, atol=1e-6)
    assert torch.allclose(layer(x[0, 0]), whole[0, 0], atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(layer(x.bfloat16()).float(), whole, atol=0.05)
