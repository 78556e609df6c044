"""GGUF adapters: names, order of rows and scale are those llama.cpp expects, seen through readers that are not ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_adapters import adapted, save
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from multiflora import ExportError
from multiflora.export.gguf_lora import to_gguf

gguf = pytest.importorskip("gguf")


def deltas(path):
    """ΔW of every stored weight as llama.cpp adds it: alpha / rank of the layer times B A."""
    reader = gguf.GGUFReader(str(path))
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    assert len(tensors) == 2 * len(names)
    pairs = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return reader.fields["general.architecture"].contents(), {
        name: (b * (alpha / b.shape[1])) @ a for name, (a, b) in pairs.items()
    }


STORED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("name", ["mlora", "lora"])
def test_llama_adapter_undone_by_transformers_own_gguf_reader_is_the_update(name, tiny_llama, tmp_path):
    base = tiny_llama(num_key_value_heads=2)
    base.save_pretrained(tmp_path / "base")
    model = adapted(name, base, rank_pattern={"k_proj": 3}, alpha_pattern={"up_proj": 5})
    to_gguf(save(model, tmp_path / "ours"), tmp_path / "gguf", base=tmp_path / "base")
    family, found = deltas(tmp_path / "gguf/adapter.gguf")
    assert family == "llama"
    # transformers reads llama.cpp's q and k back into its own order: the inverse of ours, written by others
    back = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    for block in range(2):
        for ours, theirs in STORED.items():
            stored = f"blk.{block}.{theirs}.weight"
            undone = back.process(found.pop(stored), stored).weights
            module = model.get_submodule(f"base_model.model.model.layers.{block}.{ours}")
            wanted = module.get_delta_weight("default").detach().numpy()
            assert np.abs(undone - wanted).max() < 1e-5, stored
    assert not found


def test_qwen_keeps_the_order_of_its_rows(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, num_key_value_heads=2, **shape))
    base.save_pretrained(tmp_path / "base")
    model = adapted("multilora", base)
    to_gguf(save(model, tmp_path / "ours"), tmp_path / "gguf", base=tmp_path / "base")
    family, found = deltas(tmp_path / "gguf/adapter.gguf")
    assert family == "qwen2"
    wanted = model.base_model.model.model.layers[1].self_attn.q_proj.get_delta_weight("default").detach().numpy()
    assert np.abs(found["blk.1.attn_q.weight"] - wanted).max() < 1e-5


def test_one_file_for_each_task(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    folder = save(adapted("moelora", tiny_llama()), tmp_path / "ours")
    to_gguf(folder, tmp_path / "gguf", base=tmp_path / "base")
    names = sorted(path.name for path in (tmp_path / "gguf").iterdir())
    assert names == ["labels.gguf", "llama-server.json", "report.json", "sums.gguf"]
    _, sums = deltas(tmp_path / "gguf/sums.gguf")
    _, labels = deltas(tmp_path / "gguf/labels.gguf")
    assert np.abs(sums["blk.0.ffn_up.weight"] - labels["blk.0.ffn_up.weight"]).max() > 1e-4


def test_what_llama_cpp_has_no_place_for_is_refused(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    saved_in_full = save(adapted("mlora", tiny_llama(), modules_to_save=["norm"]), tmp_path / "full")
    with pytest.raises(ExportError, match=r"holds .*norm\.weight besides its layers"):
        to_gguf(saved_in_full, tmp_path / "gguf", base=tmp_path / "base")
    head = save(adapted("mlora", tiny_llama(), target_modules=["lm_head", "q_proj"]), tmp_path / "head")
    with pytest.raises(ExportError, match="cannot take an adapter of the layer lm_head in a llama model"):
        to_gguf(head, tmp_path / "gguf", base=tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ExportError, match="The base model is of type 'gpt2'; GGUF adapters can be written for llama"):
        to_gguf(saved_in_full, tmp_path / "gguf", base=tmp_path / "gpt2")
    assert not (tmp_path / "gguf").exists()
