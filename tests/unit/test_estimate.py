"""What a dry run says, against the real parts: the model with storage, its tensors' bytes, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from multiflora.base_model import empty_model, load_config
from multiflora.errors import ConfigError
from multiflora.estimate import activation_bytes, adapted_modules, count_parameters, memory_of
from multiflora.methods import METHODS, build_config, settings_of
from multiflora.recipe import ModelSpec
from multiflora.training.adapter import parameter_counts, put_on

SHAPE: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}


def adapt_on_meta(config: LlamaConfig, adapter: Any, dtype: torch.dtype = torch.float32) -> Any:
    return put_on(empty_model(config, dtype=dtype), adapter, low_cpu_mem_usage=True)


def settings(name: str, **more: Any) -> dict[str, Any]:
    tasks = {"num_tasks": 2, "task_names": ["a", "b"]} if METHODS[name].module else {}
    known = settings_of(name)
    usual = {"target_modules": METHODS[name].target_modules, "r": 8, "task_type": "CAUSAL_LM"}
    return {key: value for key, value in usual.items() if key in known and value} | tasks | more


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_counts_on_the_meta_device_are_those_of_the_real_model(name: str, tied: bool) -> None:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    adapter = build_config(name, settings(name))
    light = adapt_on_meta(config, adapter)
    real = put_on(AutoModelForCausalLM.from_config(config), build_config(name, settings(name)))
    assert count_parameters(light) == count_parameters(real) == parameter_counts(real)
    assert adapted_modules(light) == adapted_modules(real)
    assert {p.device.type for p in light.parameters()} == {"meta"}


def test_modules_are_counted_by_name_over_the_layers() -> None:
    adapter = build_config("rlora", settings("rlora", target_modules=["q_proj", "down_proj"]))
    assert adapted_modules(adapt_on_meta(LlamaConfig(**SHAPE), adapter)) == {
        "model.layers.*.self_attn.q_proj": 3,
        "model.layers.*.mlp.down_proj": 3,
    }


@pytest.mark.parametrize("name", ["lora", "rlora"])
def test_memory_is_the_bytes_of_the_tensors(name: str) -> None:
    config = LlamaConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    real = get_peft_model(model, build_config(name, settings(name)))
    every = sum(t.numel() * t.element_size() for t in (*real.parameters(), *real.buffers()))
    trained = 4 * count_parameters(real)[0]
    light = adapt_on_meta(config, build_config(name, settings(name)), dtype=torch.bfloat16)
    memory = memory_of(light, activations=1000)
    assert memory == memory_of(real, activations=1000)
    assert (memory.weights, memory.adapter) == (base, every - base)
    assert (memory.gradients, memory.optimizer) == (trained, 2 * trained)
    assert memory.total == every + 3 * trained + 1000


def test_a_model_that_is_trained_whole_has_no_adapter() -> None:
    config = LlamaConfig(**SHAPE)
    size = 4 * count_parameters(AutoModelForCausalLM.from_config(config))[1]
    memory = memory_of(adapt_on_meta(config, None), activations=0)
    assert memory.adapter == 0
    assert memory.gradients == size
    assert memory.optimizer == 2 * size
    assert size <= memory.weights < 1.01 * size  # and a few buffers


@pytest.mark.parametrize("name", METHODS)
def test_activations_of_every_method_are_counted(name: str) -> None:
    model = adapt_on_meta(LlamaConfig(**SHAPE), build_config(name, settings(name)))
    told = [activation_bytes(model, rows=2, length=length, loss_tokens=4) for length in (8, 16)]
    assert 0 < told[0] < told[1]


@pytest.mark.parametrize("name", ["lora", "rlora", "multilora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_what_autograd_keeps(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    rows, length, positions = 4, 128, 60
    model = get_peft_model(
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 6}), dtype=dtype),
        build_config(name, settings(name)),
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    told = activation_bytes(model, rows=rows, length=length, loss_tokens=positions, checkpointing=checkpointing)
    kept = _kept(model, rows, length, positions)
    # recomputing one layer is part of the peak, but nothing that the forward pass itself keeps
    within = told - activation_bytes(model, rows=rows, length=length, loss_tokens=0) // 6 if checkpointing else told
    assert kept == pytest.approx(within, rel=0.15)


def _kept(model: Any, rows: int, length: int, positions: int) -> int:
    """Bytes that autograd saves in a forward pass up to the loss, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    base = model.get_base_model()
    # as in training: peft's LoRA casts its input to float32, and autocast brings the product back
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=base.dtype == torch.bfloat16 and model.peft_type == "LORA")
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = base.model(input_ids=torch.randint(0, 200, (rows, length)), use_cache=False).last_hidden_state
        logits = base.lm_head(hidden.reshape(rows * length, -1)[:positions])
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(positions, dtype=torch.long))
    assert loss.requires_grad
    return sum(saved.values())


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No config could be loaded from .*the folder holds no config\.json"):
        load_config(ModelSpec(name=str(tmp_path)))
