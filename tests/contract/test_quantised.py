"""The contract on quantised bases, all on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from contract.cases import IDS, layers, logits, relative, stir
from multiflora import ExportError

FIRST = torch.zeros(2, dtype=torch.long)


def eight_bits():
    """bitsandbytes, 8 bits."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bits():
    """bitsandbytes, 4 bits."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")


def torchao():
    """torchao, int8 weights."""
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())


def quantised(case, tiny_llama, folder, config):
    """The logits of a small quantised Llama, and the same model with a fresh adapter."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()
    before = logits(base, None)
    return before, case.adapt(base, task_names=["verse"])


def check_training(before, model, whole=1e-6):
    """Step 0 is the quantised base, layer by layer and as a whole; then gradients flow."""
    assert relative(logits(model, FIRST), before) <= whole
    for layer in layers(model):
        assert layer.quantization_backend is not None
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            assert relative(layer(x), layer.base_layer(x)) < 1e-6
    model.train()
    model(input_ids=IDS, labels=IDS, task_id=FIRST).loss.backward()
    grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)


def check_merging(case, model, refused, rounding):
    """A merge writes the sum as these few bits can say it, or is refused."""
    before = logits(stir(model), FIRST)
    if case.merges == "no":
        with pytest.raises(ExportError, match="cannot be merged") as raised:
            model.merge_and_unload()
        assert torch.equal(logits(model, FIRST), before)
        refused(raised.value)
        return
    deltas = [layer.get_delta_weight("default") for layer in layers(model)]
    sums = [layer.get_base_weight() + delta for layer, delta in zip(layers(model), deltas, strict=True)]
    model.merge_adapter()
    for layer, expected, delta in zip(layers(model), sums, deltas, strict=True):
        assert relative(layer.get_base_weight(), expected) < rounding
        assert delta.norm() > 2 * rounding * expected.norm()


def test_bitsandbytes_8bit(case, tiny_llama, tmp_path):
    """bitsandbytes 8-bit: step 0 is the base, and it trains."""
    before, model = quantised(case, tiny_llama, tmp_path, eight_bits())
    # each layer rounds its input to 8 bits, so what differs by 1e-7 may differ by a step after the next layer
    check_training(before, model, whole=0.02)


def test_merge_bitsandbytes_8bit(case, tiny_llama, tmp_path, refused):
    """bitsandbytes 8-bit: merges where the method merges."""
    _, model = quantised(case, tiny_llama, tmp_path, eight_bits())
    check_merging(case, model, refused, rounding=0.02)


def test_bitsandbytes_4bit(case, tiny_llama, tmp_path):
    """bitsandbytes 4-bit: step 0 is the base, and it trains."""
    check_training(*quantised(case, tiny_llama, tmp_path, four_bits()))


def test_merge_bitsandbytes_4bit(case, tiny_llama, tmp_path, refused):
    """bitsandbytes 4-bit: merges where the method merges."""
    _, model = quantised(case, tiny_llama, tmp_path, four_bits())
    check_merging(case, model, refused, rounding=0.15)


def test_torchao_int8(case, tiny_llama, tmp_path):
    """torchao int8: step 0 is the base, and it trains."""
    check_training(*quantised(case, tiny_llama, tmp_path, torchao()))


def test_merge_torchao_int8(case, tiny_llama, tmp_path, refused):
    """torchao int8: merges where the method merges."""
    _, model = quantised(case, tiny_llama, tmp_path, torchao())
    check_merging(case, model, refused, rounding=0.02)
