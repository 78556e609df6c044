"""Whole storages are counted, each once."""

from __future__ import annotations

import torch
from torch import nn

from multiflora.bench.layers import measure_memory
from multiflora.bench.memory import kept_bytes, peak_bytes
from multiflora.bench.shapes import Shape

CPU = torch.device("cpu")


def test_what_is_kept_counts_once_and_known_tensors_not_at_all():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward():
        hidden = x @ weight  # keeps x and weight
        return hidden * hidden  # keeps hidden, twice

    assert kept_bytes(forward, [x, weight]) == hidden_bytes(8, 4)
    assert kept_bytes(forward, [weight]) == hidden_bytes(8, 4) + x.nbytes


def test_a_view_keeps_all_of_its_storage():
    x = torch.randn(8, 4, requires_grad=True)
    assert kept_bytes(lambda: (x * 2)[:1].exp() * (x * 2)[:1], [x]) >= hidden_bytes(8, 4)


def test_a_loop_keeps_what_grows_with_heads_and_the_packed_op_does_not():
    case = measure_memory(Shape("m", "up", 32, 96), tokens=(16, 48), dtype=torch.float32, dropout=0.1, device=CPU)
    # u with the offset's and the router's rows, and the gate: float32
    assert case.per_token("packed") <= 4 * (2 * 8 + 5 + 5)
    assert case.per_token("loop") >= 5 * 96 * 4
    assert case.per_token("frozen") == 0


def test_peak_is_what_is_held_at_once():
    def run():
        first = torch.ones(1000)
        del first
        second, third = torch.ones(1000), torch.ones(1000)
        return second + third

    run()
    assert 3 * 4000 <= peak_bytes(run, CPU) < 4 * 4000


def test_a_module_that_keeps_nothing_keeps_nothing():
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    assert kept_bytes(lambda: layer(x), [x, layer.weight]) == 0


def hidden_bytes(*shape):
    return torch.empty(shape).nbytes
