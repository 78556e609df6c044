"""What is exported computes what it was made from, or is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_adapters import save
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from multiflora.adapter_folder import load_adapter
from multiflora.errors import AdapterError, ExportError
from multiflora.export.dense import merge
from multiflora.export.same import check_logits, logits_of
from multiflora.methods import build_config
from multiflora.train.adapter import put_on

TIED = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
]


@pytest.fixture
def tied(tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("multiflora.export.dense.load_tokenizer_of", lambda *_: _NoTokenizer())
    return model


class _NoTokenizer:
    def save_pretrained(self, folder):
        """The tiny models have none."""


def trained(base: Path, folder: Path, size: float = 0.1, **settings) -> Path:
    """A LoRA by stock peft, as others save it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    return save(model, folder)


@pytest.mark.parametrize("settings", TIED[:3], ids=str)
def test_a_merge_takes_tied_weights_apart(tied, tmp_path, settings):
    adapter = trained(tmp_path / "base", tmp_path / "adapter", **settings)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits_of(PeftModel.from_pretrained(base, str(adapter)).eval())
    merge(adapter, tmp_path / "dense", base=tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-4)
    found.tie_weights()  # as a harness does
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "rlora"])
@pytest.mark.parametrize("settings", TIED, ids=str)
def test_nothing_is_trained_on_one_of_two_tied_weights(tied, method, settings):
    config = build_config(method, {"target_modules": ["q_proj"], **settings, "task_type": "CAUSAL_LM"})
    with pytest.raises(AdapterError, match=r"share one weight in this model.*Leave both out of target_modules"):
        put_on(tied, config)


@pytest.mark.parametrize("settings", TIED, ids=str)
def test_nothing_is_scored_with_one_of_two_tied_weights_changed(tied, tmp_path, settings):
    adapter = trained(tmp_path / "base", tmp_path / "adapter", **settings)
    with pytest.raises(AdapterError, match=r"share one weight in this model"):
        load_adapter(tied, adapter)


def test_an_untied_model_takes_them_all(tiny_llama):
    for settings in TIED:
        put_on(tiny_llama(), build_config("lora", {"target_modules": ["q_proj"], **settings, "task_type": "CAUSAL_LM"}))


def test_what_float16_cannot_hold_is_refused(tied, tmp_path):
    tied.half().save_pretrained(tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "adapter", size=3000.0)
    with pytest.raises(ExportError, match=r"q_proj with its update does not fit into float16, whose largest.*65,504"):
        merge(adapter, tmp_path / "dense", base=tmp_path / "base")
    assert not (tmp_path / "dense").exists()
    merge(adapter, tmp_path / "dense", base=tmp_path / "base", dtype="float32")  # the way that is told


def test_a_generation_config_that_transformers_will_not_write_goes_along(tied, tmp_path):
    words = {"do_sample": False, "temperature": 0.3, "top_p": 0.4}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(words), "utf-8")
    merge(trained(tmp_path / "base", tmp_path / "adapter"), tmp_path / "dense", base=tmp_path / "base")
    found = json.loads((tmp_path / "dense" / "generation_config.json").read_text("utf-8"))
    assert {key: found[key] for key in words} == words


def test_a_quantised_base_is_refused_before_anything_is_computed(tied, tmp_path):
    adapter = trained(tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"is quantised.*Name the unquantised model with --base"):
        merge(adapter, tmp_path / "dense", base=tmp_path / "base")


def test_a_merge_that_computes_something_else_is_not_put_in_place(tied, tmp_path, monkeypatch):
    adapter = trained(tmp_path / "base", tmp_path / "adapter")
    monkeypatch.setattr("multiflora.export.dense._add", lambda *_: None)
    with pytest.raises(ExportError, match=r"does not compute what the adapter does: its logits are off by up to"):
        merge(adapter, tmp_path / "dense", base=tmp_path / "base")
    assert not (tmp_path / "dense").exists()


def test_logits_that_are_no_numbers_are_never_the_same():
    with pytest.raises(ExportError, match="logits are off by up to nan"):
        check_logits(torch.full((1, 1, 2), torch.nan), torch.ones(1, 1, 2), "It")
