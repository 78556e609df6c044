"""What peft's methods need while they train: AdaLoRA's schedule and loss, and the checkpoint's missing half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from multiflora.errors import ConfigError
from multiflora.training.baselines import (
    adalora_steps,
    orthogonality,
    restore_training,
    save_training,
    training_settings,
)
from tests.integration.toys import make_recipe

TinyLlama = Callable[..., LlamaForCausalLM]


def test_adalora_s_schedule_is_a_share_of_the_run_where_nothing_else_is_said() -> None:
    assert adalora_steps({}, 250) == {"total_step": 250, "tinit": 25, "tfinal": 75, "deltaT": 2}
    assert adalora_steps({}, 10) == {"total_step": 10, "tinit": 1, "tfinal": 3, "deltaT": 1}
    assert adalora_steps({"tinit": 4, "tfinal": 5, "deltaT": 3}, 10) == {
        "total_step": 10, "tinit": 4, "tfinal": 5, "deltaT": 3,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"tinit is 5 and method.tfinal is 5, but the run has 10 steps"):
        adalora_steps({"tinit": 5, "tfinal": 5}, 10)


def test_settings_of_the_training_have_their_defaults(tmp_path: Path) -> None:
    assert training_settings(make_recipe(tmp_path, "lora")) == {}
    assert training_settings(make_recipe(tmp_path, "loraplus")) == {"loraplus_lr_ratio": 16.0}
    own = {"name": "loraplus", "loraplus_lr_ratio": 4.0}
    assert training_settings(make_recipe(tmp_path, own)) == {"loraplus_lr_ratio": 4.0}


def adalora(tiny_llama: TinyLlama) -> torch.nn.Module:
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], orth_reg_weight=0.5)
    return get_peft_model(tiny_llama(), config)


def test_adalora_s_loss_is_the_mean_distance_from_orthogonal_directions(tiny_llama: TinyLlama) -> None:
    model = adalora(tiny_llama)
    norms = []
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            norms.append((weight @ weight.t() - torch.eye(3)).norm())
        elif "lora_B" in name:
            norms.append((weight.t() @ weight - torch.eye(3)).norm())
    assert len(norms) == 4
    assert float(orthogonality(model)) == pytest.approx(0.5 * float(sum(norms)) / 4)
    assert orthogonality(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))) == 0.0


def test_a_checkpoint_keeps_the_importance_of_adalora_s_directions(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = adalora(tiny_llama)
    allocator = model.base_model.rankallocator
    for key in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        getattr(allocator, key)["somewhere"] = torch.rand(3)
    pattern = model.active_peft_config.rank_pattern = {"somewhere": [True, False, True]}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    save_training(model, tmp_path)
    fresh = adalora(tiny_llama)
    assert restore_training(fresh, tmp_path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[name]) for name, p in fresh.named_parameters() if p.requires_grad)
    assert fresh.active_peft_config.rank_pattern == pattern
    for key in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        kept = getattr(fresh.base_model.rankallocator, key)
        assert torch.equal(kept["somewhere"], getattr(allocator, key)["somewhere"])


def test_other_adapters_leave_nothing_beside_peft_s_checkpoint(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    save_training(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not restore_training(model, tmp_path)
    assert not restore_training(adalora(tiny_llama), tmp_path)
