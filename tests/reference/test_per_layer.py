"""Layers with different numbers of heads against their papers' equations, block by block, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from multiflora.context import find
from multiflora.methods import build_config

from . import oracles

WIDTH, RANK, TASKS = 7, 2, torch.tensor([1, 0])
# method -> its own settings, and for each block what a config of that block alone would say
CASES = {
    "mixlora": ({"num_experts": [4, 2, 1]}, [{"num_experts": n, "top_k": min(n, 2)} for n in (4, 2, 1)]),
    "hydralora": (
        {"num_heads": 3, "heads_pattern": {r"blocks\.1": 1}},
        [{"num_heads": n, "top_k": None} for n in (3, 1, 3)],
    ),
    "rlora": ({"num_heads": [1, 4, 2]}, [{"num_heads": n, "top_k": None} for n in (1, 4, 2)]),
    "mlora": ({"num_heads": [2, 3, 1]}, [{"num_heads": n, "reduce": "mean"} for n in (2, 3, 1)]),
    "multilora": ({"num_modules": [3, 1, 2]}, [{"num_modules": n, "use_alpha": True} for n in (3, 1, 2)]),
    "mtllora": ({"num_heads": [1, 2, 3]}, [{"num_heads": n, "temperature": 0.1} for n in (1, 2, 3)]),
    "moelora": (
        {"num_experts": [1, 2, 3], "r": 6, "shared_gate": False},
        [{"num_experts": n, "r": 6} for n in (1, 2, 3)],
    ),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.mark.parametrize("path", ["packed", "loop", "prepared"])
@pytest.mark.parametrize("name", CASES)
def test_each_block_is_the_equation_with_its_own_number(name, path):
    settings, blocks = CASES[name]
    torch.manual_seed(3)
    still = {"head_dropout": 0.0} if name in ("rlora", "mlora") else {}
    words = {"r": RANK, "lora_alpha": 3, "lora_dropout": 0.0, "num_tasks": 2, "target_modules": r"blocks\.\d"}
    model = get_peft_model(Net().double(), build_config(name, words | still | settings), autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    find(model).loop = path == "loop"
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=path != "prepared")
    model.eval()
    with torch.set_grad_enabled(path != "prepared"):
        y = model(x, task_id=TASKS)
    r, found = settings.get("r", RANK), []
    for row, task in zip(x, TASKS.tolist(), strict=True):
        for token in row:
            for layer, own in zip(model.base_model.model.blocks, blocks, strict=True):
                base, parts, rank = layer.base_layer, layer.parts("default"), r // own.get("num_experts", 1)
                rank, mask = rank if name == "moelora" else r, torch.ones(9, 1, dtype=x.dtype)
                config, s = SimpleNamespace(**own), 3 / r
                update = getattr(oracles, name)(parts, token, token, task, s, rank, mask, config)
                token = torch.tanh(base.weight @ token + base.bias + update)
            found.append(token)
    expected = torch.stack(found).view_as(y)
    assert (y - expected).abs().max() < 1e-10
    assert not math.isclose(float((y - x).abs().max()), 0)
    if path == "prepared":
        return
    pull = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((o * pull).sum(), [x, *trained], allow_unused=True) for o in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - (torch.zeros_like(one) if other is None else other)).abs().max() < 1e-10
