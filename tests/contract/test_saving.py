"""The contract of saving and loading."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from contract.cases import CASES, TASKS, layers, logits, stir, train
from multiflora.peft_bridge import prefix

# everything that changes how an adapter computes: its scaling rule and alpha, ranks of single layers, dropout
UNUSUAL = {
    "use_rslora": True,
    "lora_alpha": 24,
    "lora_dropout": 0.1,
    "rank_pattern": {"q_proj": 32, r"layers.1.mlp.up_proj": 24},
    "alpha_pattern": {"v_proj": 7},
    "init_seed": 11,
}

# what a user's fresh process does; it shares nothing with this one but the folders
ELSEWHERE = """
import pickle, sys, torch
from contract.cases import logits
import multiflora, peft
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    with open(f"{folder}/pickled", "rb") as file:
        torch.save(logits(pickle.load(file)), f"{folder}/pickled.pt")
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    torch.save(logits(peft.PeftModel.from_pretrained(base, f"{folder}/adapter")), f"{folder}/logits.pt")
"""


@pytest.fixture(scope="module")
def saved_elsewhere(tmp_path_factory):
    """Each method's folder and what its trained adapter gave here; another process has written what it gives there."""
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case.id)
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4))
        base.save_pretrained(folder / "base")
        model = case.trained(base, **UNUSUAL)
        train(model, steps=2)
        model.save_pretrained(folder / "adapter")
        (folder / "pickled").write_bytes(pickle.dumps(model))
        found[case.id] = (folder, logits(model))
    root = str(Path(__file__).parents[1])
    folders = [str(folder) for folder, _ in found.values()]
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", ELSEWHERE, *folders], check=True, env=os.environ | {"PYTHONPATH": path})
    return found


def test_loads_in_a_new_process(case, saved_elsewhere):
    """Loaded on the pristine base in a new process, a trained adapter gives the same logits bit for bit."""
    folder, here = saved_elsewhere[case.id]
    assert torch.equal(torch.load(folder / "logits.pt"), here)


def test_pickle_opens_in_a_new_process(case, saved_elsewhere):
    """Pickled whole and opened in a new process, a model gives the same logits bit for bit."""
    folder, here = saved_elsewhere[case.id]
    assert torch.equal(torch.load(folder / "pickled.pt"), here)


def saved(case, tiny_llama, folder, **words):
    """A base and a trained adapter on disk; the adapter's model."""
    tiny_llama().save_pretrained(folder / "base")
    model = case.trained(AutoModelForCausalLM.from_pretrained(folder / "base"), **words)
    model.save_pretrained(folder / "adapter")
    return model


def test_auto_model(case, tiny_llama, tmp_path):
    """AutoPeftModelForCausalLM loads base and adapter in one call."""
    model = saved(case, tiny_llama, tmp_path, task_type="CAUSAL_LM")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_integration(case, tiny_llama, tmp_path):
    """transformers' own add_adapter, save_pretrained, load_adapter and delete_adapter."""
    base = logits(tiny_llama(), None)
    model = tiny_llama()
    torch.manual_seed(1)
    model.add_adapter(case.config(), adapter_name="one")
    stir(model)
    mine = logits(model)
    assert not torch.allclose(mine, base)
    model.save_pretrained(tmp_path / "adapter")

    other = tiny_llama()
    other.load_adapter(str(tmp_path / "adapter"), adapter_name="two")
    assert torch.equal(logits(other), mine)
    other.disable_adapters()
    assert torch.equal(logits(other), base)
    other.enable_adapters()
    other.delete_adapter("two")
    assert not any("two" in layer.configs for layer in layers(other))
    assert torch.equal(logits(other), base)


def test_low_cpu_mem_usage(case, tiny_llama, tmp_path):
    """low_cpu_mem_usage loads the same adapter."""
    model = saved(case, tiny_llama, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


def test_inference_mode(case, tiny_llama, tmp_path):
    """A loaded adapter is frozen; with is_trainable it trains."""
    saved(case, tiny_llama, tmp_path)
    frozen = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert not any(weight.requires_grad for weight in frozen.parameters())
    open_ = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    trainable = [name for name, weight in open_.named_parameters() if weight.requires_grad]
    assert trainable
    assert all(prefix(case.name) in name for name in trainable)


def test_config_is_unchanged(case, tiny_llama, tmp_path):
    """Its config comes back from disk equal, and injection changes nothing in it but all-linear's names."""
    config = case.config(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 16}, init_seed=3)
    before = copy.deepcopy(config.to_dict())
    get_peft_model(tiny_llama(), config)
    after = config.to_dict()
    # peft notes the base's name in every config it is given
    assert {key for key in before if before[key] != after[key]} <= {"base_model_name_or_path"}
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() == after


def test_modules_to_save(case, tiny_llama, tmp_path):
    """modules_to_save are trained in full and saved with the adapter."""
    base = logits(tiny_llama(), None)
    model = case.trained(tiny_llama(), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    assert head.weight.requires_grad
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded.get_base_model().lm_head.modules_to_save["default"].weight, head.weight)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)


def test_deepcopy_and_pickle(case, tiny_llama):
    """A model can be copied and pickled, also after a training step, and the copy is its own."""
    model = case.trained(tiny_llama())
    train(model, steps=1)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        stir(other, seed=9)
        assert not torch.allclose(logits(other), expected)
        with torch.no_grad():
            ids = torch.arange(6).view(1, 6)
            # the copy has routing of its own: a task given to it must not reach the original
            assert torch.equal(other(ids, task_id=TASKS[:1]).logits, other(ids, task_id=TASKS[:1]).logits)
    assert torch.equal(logits(model), expected)
