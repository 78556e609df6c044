"""A new method is one description: what CONTRIBUTING promises, done here with a method that does not exist.

MTL-LoRA was added in just this way (its file, its card, its oracle); this keeps the way open.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from multiflora import AdapterError, ConfigError, ExportError
from multiflora.methods.base import Method
from multiflora.methods.config import AdapterConfig
from multiflora.methods.gates import FixedGate, TokenRouter
from multiflora.methods.registration import register


@dataclass
class PosyConfig(AdapterConfig):
    """y = W x + s/2 · Σ_h B_h A x."""

    method_name: ClassVar[str] = "posy"
    num_heads: int = field(default=2, metadata={"help": "How many heads."})


POSY = Method(
    name="posy", config=PosyConfig, heads=lambda config: config.num_heads, gate=FixedGate(value=lambda config: 0.5)
)


@pytest.fixture
def net():
    register(POSY)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))


def test_forward_merge_save_and_load_follow_from_the_description(net, tmp_path):
    pristine = copy.deepcopy(net)
    x = torch.randn(5, 12)
    model = get_peft_model(net, PosyConfig(r=3, num_heads=4, target_modules=["0", "2"])).eval()
    assert torch.equal(model(x), pristine(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    kept = model(x)
    parts = model.base_model.model[0].parts("default")
    update = sum(parts["B"][:, 3 * h : 3 * h + 3] @ parts["A"] for h in range(4)) * 0.5 * 16 / 3
    assert torch.allclose(model.base_model.model[0].get_delta_weight("default"), update, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)(x), kept)
    assert torch.allclose(model.merge_and_unload()(x), kept, atol=1e-5)


@pytest.mark.parametrize("reads", ["token", "nothing"])
def test_what_merges_follows_from_what_the_gate_reads(reads):
    """A token router that says nothing of merging, or even that it reads nothing, is refused all the same."""
    routed = replace(POSY, gate=TokenRouter(reads=reads, top_k=lambda config: None))
    assert routed.merges() == "no"
    with pytest.raises(ExportError, match="A posy adapter cannot be merged: its router reads the input"):
        routed.static_gate(PosyConfig(r=3), {}, None)


def test_its_settings_are_checked_like_any_others(net):
    with pytest.raises(ConfigError, match="PosyConfig: num_heads is 0"):
        PosyConfig(num_heads=0)


def test_a_name_that_is_taken_is_not_replaced(net):
    other = Method(name="posy", config=AdapterConfig, heads=lambda config: 1, gate=FixedGate())
    with pytest.raises(AdapterError, match=r"peft already knows a method MF_POSY .*PosyConfig"):
        register(other)
