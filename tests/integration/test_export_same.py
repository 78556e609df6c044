"""What is exported computes what it was made from, or is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_adapters import adapted, save
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from multiflora.adapter_folder import load_adapter
from multiflora.errors import AdapterError, ExportError
from multiflora.export import to_lora
from multiflora.export.dense import merge
from multiflora.export.gguf_lora import to_gguf
from multiflora.export.same import check_logits, logits_of
from multiflora.methods import build_config
from multiflora.training.adapter import put_on

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
    def __len__(self):
        return 0

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


def logits_in(folder: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("name", ["lora", "multilora", "moelora"])
@pytest.mark.parametrize("to", [to_lora, to_gguf])
def test_a_conversion_that_computes_something_else_is_not_put_in_place(
    tiny_llama, tmp_path, monkeypatch, caplog, name, to
):
    tiny_llama().save_pretrained(tmp_path / "base")
    adapter = save(adapted(name, tiny_llama()), tmp_path / "adapter")
    to(adapter, tmp_path / "whole", base=tmp_path / "base")
    assert not caplog.messages
    if to is to_gguf:
        pytest.importorskip("gguf")
        monkeypatch.setattr("multiflora.export.gguf_lora._check", lambda *_: None)
        monkeypatch.setattr(
            "multiflora.export.gguf_lora._reordered",
            lambda pair, _, back=False: pair.B if back else pair.B.flip(0),
        )
    else:
        monkeypatch.setattr("multiflora.export.convert.write_lora", _twice_the_last())
    with pytest.raises(ExportError, match="does not compute what the adapter does: its logits are off by up to"):
        to(adapter, tmp_path / "broken", base=tmp_path / "base")
    assert not (tmp_path / "broken").exists()


def _twice_the_last():
    from multiflora.export.plain import write_lora

    return lambda folder, pairs, *more: write_lora(folder, [*pairs[:-1], pairs[-1]._replace(B=pairs[-1].B * 2)], *more)


def test_without_its_base_model_a_conversion_says_how_far_it_was_compared(tiny_llama, tmp_path, caplog):
    adapter = save(adapted("multilora", tiny_llama()), tmp_path / "adapter")
    to_lora(adapter, tmp_path / "plain")
    assert "is compared layer by layer, and not by the logits" in caplog.text
    with pytest.raises(ExportError, match="No base model could be loaded"):
        to_lora(adapter, tmp_path / "other", base=tmp_path / "absent")


@pytest.mark.parametrize("settings", TIED, ids=str)
def test_what_the_refusal_of_gguf_recommends_works(tied, tmp_path, settings):
    pytest.importorskip("gguf")
    adapter = trained(tmp_path / "base", tmp_path / "adapter", **settings)
    with pytest.raises(ExportError, match="--to dense"):
        to_gguf(adapter, tmp_path / "gguf", base=tmp_path / "base")
    merge(adapter, tmp_path / "dense", base=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits_of(PeftModel.from_pretrained(base, str(adapter)).eval())
    torch.testing.assert_close(logits_in(tmp_path / "dense"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", [merge, to_lora, to_gguf])
def test_a_base_in_many_files_is_exported(tied, tmp_path, to):
    tied.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    (tmp_path / "base/model.safetensors").unlink()
    adapter = save(adapted("mlora", AutoModelForCausalLM.from_pretrained(tmp_path / "many")), tmp_path / "adapter")
    to(adapter, tmp_path / "made", base=tmp_path / "many")
    if to is merge:
        to(adapter, tmp_path / "parts", base=tmp_path / "many", shard_size=" 10.5 kb")
        assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
        for size in ("2", "GB", "0GB", "two GB", "-1GB", "infGB"):
            with pytest.raises(ExportError, match="expected a number of KB, MB, GB or TB"):
                to(adapter, tmp_path / "no", base=tmp_path / "many", shard_size=size)
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(ExportError, match="No base model could be loaded"):
        to(adapter, tmp_path / "again", base=tmp_path / "many")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("rows", [60, 40])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_vocabulary_that_was_resized_is_exported(tiny_llama, tmp_path, monkeypatch, rows, is_tied):
    monkeypatch.setattr("multiflora.export.dense.load_tokenizer_of", lambda *_: _NoTokenizer())
    tiny_llama(tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    adapter = save(adapted("lora", model, target_modules=["q_proj"]), tmp_path / "adapter")
    expected = logits_of(model.eval())
    merge(adapter, tmp_path / "dense", base=tmp_path / "base")
    torch.testing.assert_close(logits_in(tmp_path / "dense"), expected, rtol=1e-4, atol=1e-4)
    to_lora(adapter, tmp_path / "plain", base=tmp_path / "base")
