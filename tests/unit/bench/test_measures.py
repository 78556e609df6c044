"""Every measure runs on something tiny, and says what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.parts import save_model, write_task
from torch import nn

from multiflora.bench import steps
from multiflora.bench.experts import measure_experts
from multiflora.bench.layers import competitor, measure_heads, measure_layer, run_layer
from multiflora.bench.shapes import Mixture, Shape
from multiflora.bench.steps import HEADS, RANK, measure_step
from multiflora.bench.training import measure_training
from multiflora.ops import native

CPU = torch.device("cpu")
SHAPE = Shape("m", "up", 24, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer(dtype):
    case = measure_layer(SHAPE, tokens=6, dtype=dtype, dropout=0.1, rounds=2, device=CPU)
    assert set(case.seconds) == {"frozen", "packed", "peft", "loop", "products"}
    for phases in case.seconds.values():
        assert {phase: len(clocks["cpu"]) for phase, clocks in phases.items()} == {"forward": 2, "backward": 2}
    assert case.kept_bytes["frozen"] == 0
    assert case.name.startswith("m up 24→40, 6 tokens, ")
    assert set(case.profile) == {"frozen", "packed"}


def test_a_competitor_trains_its_adapter_and_nothing_else():
    base = nn.Linear(24, 40, bias=False).requires_grad_(False)
    before = base.weight.clone()
    for name in ("frozen", "packed", "peft", "loop"):
        layer = competitor(name, base, heads=3, rank=2, dropout=0.0)
        x, grad = torch.randn(5, 24, requires_grad=True), torch.randn(5, 40)
        run_layer(layer, x, grad, autocast=False)()
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        assert bool(trained) == (name != "frozen")
        assert all(parameter.grad is not None for parameter in trained), name
        assert x.grad is not None
    assert torch.equal(base.weight, before)
    assert base.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", ["step", "forward", "decode"])
def test_experts(work, dtype):
    mixture = Mixture("m", 32, 16, experts=4, top_k=2)
    case = measure_experts(mixture, work=work, tokens=3, dtype=dtype, rounds=2, device=CPU)
    phases = {"forward": 2} | ({"backward": 2} if work == "step" else {})
    found = {name: {phase: len(by["cpu"]) for phase, by in seen.items()} for name, seen in case.seconds.items()}
    assert found == dict.fromkeys(("frozen", "packed", "peft"), phases)
    # of each expert: 8 stem and 5 router rows, and 40 columns; peft's rank for as many
    ours = 4 * sum(13 * d_in + 40 * d_out for d_in, d_out in ((32, 32), (16, 32)))
    assert case.parameters == {"frozen": 0, "packed": ours, "peft": 4 * case.peft_rank * (64 + 48)}
    assert abs(case.parameters["peft"] - ours) <= 4 * (64 + 48) / 2
    assert set(case.profile) == {"frozen", "packed"}
    infers = any("infer_experts" in name for name in case.profile["packed"])
    assert infers == (work != "step") or not native.state()[0]


def test_more_and_more_heads():
    case = measure_heads(SHAPE, tokens=6, dtype=torch.float32, dropout=0.1, rounds=1, device=CPU)
    assert set(case.seconds) == {"frozen", "packed 2", "packed 4", "packed 8", "packed 16", "loop 2", "loop 16"}


def test_a_step(monkeypatch):
    tiny = {"vocab_size": 32, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
    for key, value in tiny.items():
        monkeypatch.setitem(steps.SMOLLM2, key, value)
    case = measure_step(rows=2, length=8, labels=3, dtype=torch.float32, dropout=0.1, rounds=2, device=CPU)
    assert set(case.seconds) == {"frozen", "packed", "peft", "multilora", "peft 3r", "products", "multilora products"}
    assert set(case.seconds["packed"]) == {"forward", "backward", "update"}
    widths = sum(count * (d_in + d_out) for (d_in, d_out), count in LINEAR.items())
    ours = sum(count * (RANK * d_in + HEADS * RANK * d_out + HEADS * d_in) for (d_in, d_out), count in LINEAR.items())
    assert case.parameters["packed"] == ours
    assert abs(case.parameters["peft"] - ours) <= widths / 2
    assert case.parameters["peft 3r"] == 24 * widths
    assert set(case.peak_bytes) == set(case.seconds) - {"products", "multilora products"}
    assert set(case.profile) == {"frozen", "packed", "multilora"}


# of two tiny layers: q and o, k and v, gate and up, down
LINEAR = {(36, 36): 4, (36, 12): 4, (36, 48): 4, (48, 36): 2}


def test_a_training(tmp_path: Path):
    tasks = [str(write_task(tmp_path, name)) for name in ("roses", "tulips")]
    model = str(save_model(tmp_path / "model"))
    ticks = []
    case = measure_training(
        model=model,
        tasks=tasks,
        steps=2,
        batch_size=4,
        dropout=0.1,
        rounds=1,
        device=CPU,
        after_round=lambda: ticks.append(1),
    )
    assert set(case.seconds) == {"multiflora", "trl"}
    assert case.tasks == ("roses", "tulips")
    # equal size, as near as a whole rank comes on so narrow layers
    assert case.parameters["trl"] / case.parameters["multiflora"] == pytest.approx(1, abs=0.05)
    assert case.tokens > 2 * 4
    assert len(ticks) == 2
