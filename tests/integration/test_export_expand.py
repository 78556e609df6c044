"""A LoRA expanded to many heads gives the LoRA's outputs, and its heads can learn to differ."""

from __future__ import annotations

import pytest
import torch
from made_adapters import adapted, save
from peft import PeftModel
from test_export_lora import IDS, logits_of

from multiflora import ConfigError
from multiflora.context import find
from multiflora.export.expand import EXPANDABLE, expand
from multiflora.methods.layer import BranchLinear


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A trained LoRA with ranks and alphas of its own in some layers: its folder and its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("lora")
    LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **shape)).save_pretrained(folder / "base")
    model = adapted(
        "lora", base(folder), r=4, use_rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 5}
    )
    save(model, folder / "lora")
    return folder, logits_of(model)


def base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


@pytest.mark.parametrize("method", EXPANDABLE)
def test_expanded_gives_the_same_outputs(method, lora, tmp_path):
    folder, wanted = lora
    expand(folder / "lora", tmp_path / "warm", method=method, heads=4)
    model = PeftModel.from_pretrained(base(folder), str(tmp_path / "warm")).eval()
    assert (logits_of(model) - wanted).abs().max() < 1e-6 * wanted.abs().max().clamp(min=1)
    assert (wanted - logits_of(base(folder))).abs().max() > 0.01
    find(model).loop = True
    assert (logits_of(model) - wanted).abs().max() < 1e-6 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("method", EXPANDABLE)
def test_every_head_gets_a_gradient_of_its_own(method, lora, tmp_path):
    folder, _ = lora
    expand(folder / "lora", tmp_path / "warm", method=method, heads=3)
    model = PeftModel.from_pretrained(base(folder), str(tmp_path / "warm"), is_trainable=True).train()
    for _step in range(2):  # MultiLoRA's other modules move once their scales have
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    layer = next(module for module in model.modules() if isinstance(module, BranchLinear))
    heads = layer.parts("default")["B"].unflatten(1, (3, -1)).unbind(1)
    grads = layer.parts("default")["B"].grad.unflatten(1, (3, -1)).unbind(1)
    assert all(grad.abs().max() > 0 for grad in grads)
    assert all(not torch.allclose(heads[0], head, atol=1e-9) for head in heads[1:])


def test_mlora_that_sums_its_heads_is_the_lora_too(lora, tmp_path):
    folder, wanted = lora
    expand(folder / "lora", tmp_path / "warm", method="mlora", heads=3, reduce="sum", task_names=["a", "b"])
    model = PeftModel.from_pretrained(base(folder), str(tmp_path / "warm")).eval()
    assert (logits_of(model) - wanted).abs().max() < 1e-6 * wanted.abs().max().clamp(min=1)
    assert model.peft_config["default"].task_names == ["a", "b"]
    assert model.peft_config["default"].base_model_name_or_path == str(folder / "base")


def test_the_same_seed_gives_the_same_bytes(lora, tmp_path):
    folder, _ = lora
    places = [expand(folder / "lora", tmp_path / str(i), method="rlora", seed=seed) for i, seed in enumerate((7, 7, 8))]
    first, again, other = [(place / "adapter_model.safetensors").read_bytes() for place in places]
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "moelora"}, "method is 'moelora'; a LoRA cannot be expanded to it"),
        ({"method": "rlora", "router_init": "kaiming"}, "router_init is 'kaiming'"),
        ({"method": "rlora", "init_weights": "zero", "head_dropout": 0.1}, "init_weights is 'zero'; expanding needs"),
        ({"method": "rlora", "num_head": 3}, "method.num_head is not a setting of rlora; did you mean num_heads"),
        ({"method": "mlora", "heads": 0}, "num_heads is 0"),
    ],
)
def test_what_would_not_keep_the_outputs_is_refused(words, message, lora, tmp_path):
    with pytest.raises(ConfigError, match=message):
        expand(lora[0] / "lora", tmp_path / "warm", **words)
    assert not (tmp_path / "warm").exists()
