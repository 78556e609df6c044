"""A merged model is an ordinary checkpoint with the adapter's outputs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from made_adapters import TASKS, adapted, save
from test_export_lora import IDS, ROWS, logits_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from multiflora import ExportError
from multiflora.export.dense import merge


def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{n}" for n in range(48))])}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def base_folder(model, folder):
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["mlora", "multilora", "lora"])
def test_merged_model_loads_alone_with_the_same_logits(name, tiny_llama, tmp_path):
    model = adapted(name, base_folder(tiny_llama(), tmp_path / "base"))
    report = merge(save(model, tmp_path / "ours"), tmp_path / "dense", shard_size="20KB")
    assert report.exact
    shards = sorted(path.name for path in (tmp_path / "dense").glob("*.safetensors"))
    assert len(shards) > 1
    shutil.rmtree(tmp_path / "base")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert (logits_of(alone) - logits_of(model)).abs().max() < 1e-5
    assert alone.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("w3 w4").input_ids == [5, 6]


def test_a_task_gated_adapter_merges_for_a_named_task(tiny_llama, tmp_path):
    model = adapted("mtllora", base_folder(tiny_llama(), tmp_path / "base"))
    folder = save(model, tmp_path / "ours")
    with pytest.raises(ExportError, match=r"one weight for each task \(sums, labels\).*--task TASK"):
        merge(folder, tmp_path / "dense")
    merge(folder, tmp_path / "dense", task=TASKS[1])
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert (logits_of(alone) - logits_of(model, TASKS[1])).abs().max() < 1e-5


def test_a_routed_adapter_merges_by_calibration_and_says_how_far_off(tiny_llama, tmp_path):
    model = adapted("hydralora", base_folder(tiny_llama(), tmp_path / "base"), lora_alpha=1)
    folder = save(model, tmp_path / "ours")
    report = merge(folder, tmp_path / "dense", calibration=ROWS, fit=True)
    assert not report.exact
    assert json.loads((tmp_path / "dense/report.json").read_text())["how"] == "fit"
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    wanted = logits_of(model)
    assert (logits_of(alone) - wanted).norm() < 0.3 * (logits_of(plain) - wanted).norm()


def test_bfloat16_weights_are_rounded_once(tiny_llama, tmp_path):
    base = tiny_llama().to(torch.bfloat16)
    model = adapted("mlora", base_folder(base, tmp_path / "base"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    wanted = (layer.base_layer.weight.float() + layer.get_delta_weight("default")).to(torch.bfloat16)
    merge(save(model, tmp_path / "ours"), tmp_path / "dense")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert alone.dtype == torch.bfloat16
    assert torch.equal(alone.model.layers[0].mlp.up_proj.weight, wanted)


def test_conv1d_layers_and_modules_saved_in_full_are_merged(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()
    model = adapted("mlora", base_folder(base, tmp_path / "base"), target_modules=["c_attn"], modules_to_save=["ln_f"])
    merge(save(model, tmp_path / "ours"), tmp_path / "dense")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert (logits_of(alone) - logits_of(model)).abs().max() < 1e-5


def test_an_output_layer_of_its_own_is_merged_once(tiny_llama, tmp_path):
    model = adapted("mlora", base_folder(tiny_llama(), tmp_path / "base"), target_modules=["lm_head"])
    merge(save(model, tmp_path / "ours"), tmp_path / "dense")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert (logits_of(alone) - logits_of(model)).abs().max() < 1e-5


def test_a_weight_shared_with_the_embeddings_is_taken_apart(tiny_llama, tmp_path):
    base = base_folder(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    before = base.get_input_embeddings().weight.clone()
    folder = save(adapted("mlora", base, target_modules=["lm_head"]), tmp_path / "ours")
    merge(folder, tmp_path / "dense")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(found.get_input_embeddings().weight, before)
    assert not torch.equal(found.get_output_embeddings().weight, before)


def test_the_wrong_base_is_refused_by_name(tiny_llama, tmp_path):
    folder = save(adapted("mlora", base_folder(tiny_llama(), tmp_path / "base")), tmp_path / "ours")
    base_folder(tiny_llama(num_hidden_layers=1), tmp_path / "short")
    base_folder(tiny_llama(intermediate_size=40), tmp_path / "thin")
    with pytest.raises(ExportError, match=r"has no layer model\.layers\.1.*another model"):
        merge(folder, tmp_path / "dense", base=tmp_path / "short")
    with pytest.raises(ExportError, match=r"that layer of the base model is 32 x 40.*with --base"):
        merge(folder, tmp_path / "dense", base=tmp_path / "thin")
    with pytest.raises(ExportError, match=r"No base model could be loaded from 'nowhere/at-all'"):
        merge(folder, tmp_path / "dense", base="nowhere/at-all")


def test_generation_is_that_of_the_adapter(tiny_llama, tmp_path):
    model = adapted("multilora", base_folder(tiny_llama(), tmp_path / "base"))
    merge(save(model, tmp_path / "ours"), tmp_path / "dense")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    words = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(alone.generate(IDS, **words), model.generate(input_ids=IDS, **words))
