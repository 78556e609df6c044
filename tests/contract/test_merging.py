"""The contract of merging: exactly, per task, or not at all."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils import prune

from contract.cases import (
    CASES,
    IDS,
    TASK_NAMES,
    TASKS,
    base_fingerprint,
    fingerprint,
    layers,
    logits,
    relative,
    stir,
)
from multiflora import AdapterError, ExportError, context, task

ONE_TASK = {"task_names": ["verse"]}
FIRST = torch.zeros(2, dtype=torch.long)


def check_refusal(case, model, refused, merge):
    """The merge is refused with a reason, and not a byte has changed."""
    before, output = fingerprint(model.state_dict()), logits(model, FIRST)
    with pytest.raises(ExportError, match=r"cannot be merged: its router reads the input.*convert") as raised:
        merge(model)
    assert fingerprint(model.state_dict()) == before
    assert torch.equal(logits(model, FIRST), output)
    assert not any(layer.merged for layer in layers(model))
    refused(raised.value)


def test_merge_and_unload(case, tiny_llama, refused):
    """merge_and_unload gives a plain model with the same outputs to 1e-5."""
    model = case.trained(tiny_llama(), **ONE_TASK)
    if case.merges == "no":
        check_refusal(case, model, refused, lambda model: model.merge_and_unload())
        return
    expected = logits(model, FIRST)
    base = logits(tiny_llama(), None)
    merged = model.merge_and_unload()
    assert not list(layers(merged))
    assert not merged._forward_pre_hooks
    assert relative(logits(merged, None), expected) < 1e-5
    assert relative(base, expected) > 1e-2


def test_merge_for_a_task(case, tiny_llama, refused):
    """Gated by task: merges for each task, and refuses where none is named."""
    model = case.trained(tiny_llama())
    if case.merges == "no":
        check_refusal(case, model, refused, lambda model: model.merge_adapter())
        return
    outputs = []
    for i, name in enumerate(TASK_NAMES):
        expected = logits(model, tasks=torch.full((2,), i))
        with torch.no_grad():
            # the last batch has no say: a single row of the other task
            model(IDS[:1], task_id=torch.tensor([1 - i]))
        with task(model, name):
            model.merge_adapter()
        assert relative(logits(model, None), expected) < 1e-5
        assert relative(logits(model, torch.full((2,), i)), expected) < 1e-5
        if case.merges == "per task":
            # what is in the weight now is one task's; another's rows are not answered with it
            for asked in (torch.full((2,), 1 - i), TASKS):
                with pytest.raises(AdapterError, match=rf"merged for the task '{name}'.*rows of another task"):
                    logits(model, asked)
            with task(model, TASK_NAMES[1 - i]):
                with pytest.raises(AdapterError, match=rf"merged for the task '{name}'"):
                    logits(model, None)
                with pytest.raises(ExportError, match=rf"already merged into .*the task '{name}'; call unmerge"):
                    model.merge_adapter()
        model.unmerge_adapter()
        assert relative(logits(model, tasks=torch.full((2,), i)), expected) < 1e-5
        outputs.append(expected)
    assert (relative(*outputs) > 1e-2) == (case.merges == "per task")
    if case.merges == "per task":
        before = base_fingerprint(model)
        with torch.no_grad():
            model(IDS[:1], task_id=torch.tensor([1]))
        with pytest.raises(ExportError, match=r"has one weight per task.*verse, prose"):
            model.merge_and_unload()
        assert base_fingerprint(model) == before


def test_merge_and_unmerge(case, tiny_llama, refused):
    """merge_adapter, unmerge_adapter and a merged adapter switched off."""
    model = case.trained(tiny_llama(), **ONE_TASK)
    if case.merges == "no":
        check_refusal(case, model, refused, lambda model: model.merge_adapter())
        return
    expected, base = logits(model, FIRST), logits(tiny_llama(), None)
    model.merge_adapter()
    assert relative(logits(model, FIRST), expected) < 1e-5
    with model.disable_adapter():
        assert relative(logits(model, FIRST), base) < 1e-5
    model.merge_adapter()
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model))
    assert relative(logits(model, FIRST), expected) < 1e-5


def test_safe_merge(case, tiny_llama, refused):
    """safe_merge equals the plain merge, and stops before it writes a NaN."""
    model = case.trained(tiny_llama(), **ONE_TASK)
    if case.merges == "no":
        check_refusal(case, model, refused, lambda model: model.merge_adapter(safe_merge=True))
        return
    expected = logits(model, FIRST)
    model.merge_adapter(safe_merge=True)
    assert relative(logits(model, FIRST), expected) < 1e-5
    model.unmerge_adapter()
    first = next(layers(model))
    before = first.base_layer.weight.clone()
    with torch.no_grad():
        first.parts("default")["B"][0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"NaNs detected.*default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(first.base_layer.weight, before)


def test_merge_into_all_layers_or_none(case, tiny_llama, refused):
    """A merge goes into all layers or none: adapters by name, a NaN in the last layer, a name that nobody has."""
    model = case.trained(tiny_llama(), **ONE_TASK)
    model.add_adapter("routed", case.config(target_modules=["down_proj"], **ONE_TASK))
    before = base_fingerprint(model)
    if case.merges == "no":
        check_refusal(case, model, refused, lambda model: model.merge_adapter(adapter_names=["default", "routed"]))
        check_refusal(case, model, refused, lambda model: model.merge_and_unload(adapter_names=["routed"]))
        layer = next(layer for layer in layers(model) if "routed" in layer.configs)
        check_refusal(case, model, refused, lambda model: layer.merge(adapter_names=["default", "routed"]))
        return
    with pytest.raises(ExportError, match=r"no adapter 'nobody' to merge; there are default, routed"):
        model.merge_adapter(adapter_names=["default", "nobody"])
    with torch.no_grad():
        list(layers(model))[-1].parts("default")["B"][0, 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ExportError, match=r"NaNs detected"):
            merge(safe_merge=True)
        assert base_fingerprint(model) == before
        assert not any(layer.merged for layer in layers(model))


def test_merge_into_a_shared_weight(case, tiny_llama, refused):
    """A weight that another module uses, too (a tied output layer), is not merged into."""
    words = ONE_TASK | {"target_modules": ["lm_head", "q_proj"]}
    model = case.trained(tiny_llama(tie_word_embeddings=True), **words)
    output, before = logits(model, FIRST), base_fingerprint(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        why = "router reads the input" if case.merges == "no" else "into lm_head: its weight is also that of .*embed_to"
        with pytest.raises(ExportError, match=why) as raised:
            merge()
        assert base_fingerprint(model) == before
        assert torch.equal(logits(model, FIRST), output)
    refused(raised.value)


def test_unmerge_takes_off_what_was_added(case, tiny_llama):
    """What is unmerged, or unloaded, is what was merged, whatever the adapter has become in between."""
    if case.merges == "no":
        pytest.skip("it does not merge")
    base = logits(tiny_llama(), None)
    for undo in ("unmerge_adapter", "unload"):
        model = case.trained(tiny_llama(), **ONE_TASK)
        model.merge_adapter()
        stir(model, seed=7)
        getattr(model, undo)()
        with model.disable_adapter() if undo == "unmerge_adapter" else nullcontext():
            assert relative(logits(model, None), base) < 1e-5


def test_merge_into_a_pruned_weight(case, tiny_llama, refused):
    """A pruned layer is adapted and trained; a merge is refused until prune.remove has made it plain."""
    base = tiny_llama()
    pruned = base.model.layers[0].self_attn.q_proj
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    untouched = logits(base, None)
    model = case.trained(base, **ONE_TASK)
    with model.disable_adapter():
        assert torch.equal(logits(model, None), untouched)
    output = logits(model, FIRST)
    model(input_ids=IDS, labels=IDS, task_id=FIRST).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    why = "router reads the input" if case.merges == "no" else r"q_proj: its weight is computed anew.*prune\.remove"
    with pytest.raises(ExportError, match=why) as raised:
        model.merge_adapter()
    refused(raised.value)
    if case.merges != "no":
        prune.remove(pruned, "weight")
        assert relative(logits(model.merge_and_unload(), None), output) < 1e-5


def test_merge_bfloat16(case, tiny_llama, refused):
    """Merging into a bfloat16 base rounds once."""
    model = case.trained(tiny_llama().to(torch.bfloat16), **ONE_TASK)
    if case.merges == "no":
        check_refusal(case, model, refused, lambda model: model.merge_and_unload())
        return
    layer = next(layers(model))
    delta = layer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    expected = (layer.base_layer.weight.float() + delta).to(torch.bfloat16)
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, expected)


def test_convert_to_lora(case, tiny_llama, refused):
    """peft's own convert_to_lora takes what is one matrix, and is told of the rest."""
    from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict

    model = case.trained(tiny_llama(), **ONE_TASK)
    if case.merges != "exactly":
        assert not model.supports_lora_conversion()
        what = "not one matrix" if case.merges == "no" else "one matrix per task"
        refused(f"The update is {what}, so peft is told that it does not convert; `multiflora convert` does it.")
        return
    expected = logits(model, FIRST)
    config, state = convert_to_lora(model, rank=32)
    plain = get_peft_model(tiny_llama(), config)
    set_peft_model_state_dict(plain, state)
    assert relative(logits(plain, None), expected) < 1e-4
    assert context.find(plain) is None


def test_all_three_kinds_are_here():
    assert {case.merges for case in CASES} == {"no", "per task", "exactly"}
