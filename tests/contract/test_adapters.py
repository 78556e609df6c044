"""The contract of several adapters on one base."""

from __future__ import annotations

import torch
from peft import get_peft_model

from contract.cases import IDS, TASKS, LlamaForCausalLM, base_fingerprint, layers, logits, stir
from multiflora import context, task


def two(case, tiny_llama):
    """A model with the adapters "one" and "two", and their logits."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), case.config(task_type="CAUSAL_LM"), adapter_name="one")
    stir(model, seed=1)
    model.add_adapter(
        "two", case.config(r=32, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])
    )
    first = logits(model)
    model.set_adapter("two")
    stir(model, seed=2)
    return model, first, logits(model)


def test_disabled_is_the_base(case, tiny_llama):
    """With the adapter disabled, the model is the base, bit for bit; enabled again, it is as before."""
    base = logits(tiny_llama(), None)
    model = case.trained(tiny_llama())
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.allclose(before, base, atol=1e-3)
    assert torch.equal(logits(model), before)


def test_two_adapters(case, tiny_llama):
    """Two adapters of different ranks and targets, switched by set_adapter."""
    model, first, second = two(case, tiny_llama)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("one")
    assert torch.equal(logits(model), first)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trainable
    assert all(name.rpartition(".")[2] == "one" for name in trainable)
    model.set_adapter("two")
    assert torch.equal(logits(model), second)


def test_two_active_adapters_add_up(case, tiny_llama):
    """Two adapters active at once add their updates, layer by layer."""
    model, *_ = two(case, tiny_llama)
    layer = next(layer for layer in layers(model) if len(layer.configs) == 2)
    x = torch.randn(2, 7, layer.in_features)

    @torch.no_grad()
    def output(*names):
        model.base_model.set_adapter(list(names))
        with task(model, TASKS.tolist()):
            return layer(x)

    with torch.no_grad():
        base = layer.base_layer(x)
    together = output("one", "two") - base
    apart = (output("one") - base) + (output("two") - base)
    assert torch.allclose(together, apart, atol=1e-5)
    assert apart.abs().max() > 1e-2


def test_delete_adapter(case, tiny_llama):
    """delete_adapter leaves nothing of it and nothing else changed."""
    model, first, _ = two(case, tiny_llama)
    model.delete_adapter("two")
    assert not any("two" in name.split(".") for name in model.state_dict())
    assert not any("two" in {**layer.configs, **layer.ranks, **layer.scaling} for layer in layers(model))
    assert list(context.find(model).configs) == ["one"]
    model.set_adapter("one")
    assert torch.equal(logits(model), first)


def test_mixed_batch(case, tiny_llama):
    """adapter_names gives each row its own adapter, or none; each with its own task."""
    model, first, second = two(case, tiny_llama)
    with model.disable_adapter():
        base = logits(model)
    with torch.no_grad():
        for names, expected in {
            ("one", "two"): (first[0], second[1]),
            ("two", "__base__"): (second[0], base[1]),
        }.items():
            mixed = model(input_ids=IDS, task_id=TASKS, adapter_names=list(names)).logits
            for row in range(2):
                assert torch.allclose(mixed[row], expected[row], atol=1e-5)


def test_mixed_batch_in_generation(case, tiny_llama):
    """generate takes adapter_names and task_id, beams included."""
    model, *_ = two(case, tiny_llama)
    # greedy choices of small random models hang on little: give the adapters weight
    stir(model, seed=5)
    words = {"input_ids": IDS, "max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    model.eval()
    alone = []
    for name in ("one", "two"):
        model.set_adapter(name)
        alone.append(model.generate(**words, task_id=TASKS))
    mixed = model.generate(**words, task_id=TASKS, adapter_names=["one", "two"])
    assert mixed.shape == alone[0].shape == (2, 12)
    assert torch.equal(mixed[0], alone[0][0])
    assert torch.equal(mixed[1], alone[1][1])


def test_unload(case, tiny_llama):
    """unload gives the base back: its class, its weights, its calls."""
    base = tiny_llama()
    before, state = logits(base, None), base_fingerprint(base)
    model = case.trained(base).unload()
    assert type(model) is LlamaForCausalLM
    assert not list(layers(model))
    assert not model._forward_pre_hooks
    assert base_fingerprint(model) == state
    assert torch.equal(logits(model, None), before)
