"""The contract of a mixture's fused experts: target_parameters gives each its own branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import MIXTURES, PRODUCTS, mixture
from peft import PeftModel
from torch import Tensor

from contract.cases import (
    IDS,
    TASKS,
    Case,
    base_fingerprint,
    fingerprint,
    logits,
    relative,
    stir,
    train,
)
from multiflora import AdapterError, ExportError, task
from multiflora.adapter_folder import load_adapter
from multiflora.methods.experts import AdaptedExperts, BranchExperts

KINDS = pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])


def words(case: Case, kind: str, **more: Any) -> dict[str, Any]:
    """Attention and experts; the losses that need many tokens are off."""
    own = {"target_modules": ["q_proj"], "target_parameters": list(PRODUCTS[kind]), "r": 8}
    return own | ({"align_weight": 0.0} if case.name == "alignlora" else {}) | more


@pytest.fixture
def takes_experts(case: Case, refused: Any) -> None:
    """Methods that do not are refused before anything is replaced; the other tests are about the rest."""
    base = mixture("mixtral")
    if case.name not in ("loraga", "deltalora"):
        return
    with pytest.raises(AdapterError, match=r"of linear layers alone.*target_parameters") as raised:
        case.adapt(base, **words(case, "mixtral"))
    assert not any(isinstance(module, AdaptedExperts) for module in base.modules())
    refused(raised.value)
    pytest.skip("refused")


def adapted_experts(model: torch.nn.Module) -> list[BranchExperts]:
    return [module for module in model.modules() if isinstance(module, BranchExperts)]


@pytest.mark.parametrize("kind", MIXTURES)
def test_start(case: Case, takes_experts: None, kind: str) -> None:
    """Before the first step a mixture with branches on its experts answers as the base model does"""
    base = mixture(kind)
    before = logits(base, None)
    model = case.adapt(base, **words(case, kind))
    assert len(adapted_experts(model)) == len([n for n, _ in base.named_parameters() if "experts.base_layer" in n]) / (
        2 if kind == "gpt-oss" else 1
    )
    assert relative(logits(model), before) < 1e-6
    stir(model)
    for layer in adapted_experts(model):  # and every fused parameter has a say of its own
        changed = logits(model)
        with torch.no_grad():
            for part in layer.parts("default").values():
                part.mul_(1.5)
        assert relative(logits(model), changed) > 1e-5


@KINDS
def test_save_and_load(case: Case, takes_experts: None, kind: str, tmp_path: Any) -> None:
    """Branches of experts are saved whole; peft, transformers and multiflora load them to the same numbers"""
    model = case.trained(mixture(kind), **words(case, kind))
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(mixture(kind), str(tmp_path)).eval()), expected)
    assert torch.equal(logits(load_adapter(mixture(kind), tmp_path).eval()), expected)
    native = mixture(kind)
    native.load_adapter(str(tmp_path))
    assert relative(logits(native), expected) < 1e-6


@KINDS
def test_merging(case: Case, takes_experts: None, kind: str) -> None:
    """A merge into experts is exact, and can be taken off again; or it is refused"""
    base = mixture(kind)
    before = base_fingerprint(base)
    model = case.trained(base, **words(case, kind))
    if case.merges == "no":
        with pytest.raises(ExportError, match="no single weight matrix equals"):
            model.merge_adapter()
        assert base_fingerprint(model) == before
        return
    for index in (0, 1):
        same = torch.full((2,), index)
        expected = logits(model, same)
        with task(model, index):
            model.merge_adapter()
            assert all(layer.merged for layer in adapted_experts(model))
            assert relative(logits(model, same), expected) < 1e-5
        model.unmerge_adapter()
        assert relative(logits(model, same), expected) < 1e-5
    with task(model, 1):
        plain = model.merge_and_unload()
    assert not adapted_experts(plain)
    assert type(plain) is type(base)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in mixture(kind).named_parameters()}
    assert relative(logits(plain, None), expected) < 1e-5


@KINDS
def test_several_adapters(case: Case, takes_experts: None, kind: str) -> None:
    """Adapters with different experts on one mixture are switched, switched off, deleted and unloaded"""
    base = mixture(kind)
    whole, before = base_fingerprint(base), logits(base, None)
    model = case.trained(base, **words(case, kind))
    first = logits(model)
    model.add_adapter("second", case.config(**words(case, kind, r=16, target_parameters=PRODUCTS[kind][1:])))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    stir(model, seed=2)
    second = logits(model)
    assert relative(second, first) > 1e-4
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    assert relative(logits(model), first) > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert relative(logits(model), second) < 1e-6
    plain = model.unload()
    assert base_fingerprint(plain) == whole
    assert torch.equal(logits(plain, None), before)


@pytest.mark.parametrize("kind", MIXTURES)
def test_tasks(case: Case, takes_experts: None, kind: str) -> None:
    """A token's task goes with it to its experts: rows of several tasks answer as each does alone"""
    model = case.trained(mixture(kind), **words(case, kind))
    together = logits(model)
    for index in (0, 1):
        alone, chosen = logits(model, torch.full((2,), index)), torch.eq(TASKS, index)
        assert relative(together[chosen], alone[chosen]) < 1e-5
    each = TASKS.unsqueeze(1).expand(2, together.shape[1])
    assert relative(logits(model, each), together) < 1e-6
    swapped = logits(model, 1 - TASKS)
    needs = case.method.of(case.config()).needs_task()
    assert (relative(swapped, together) > 1e-4) == needs


def prepared(model: torch.nn.Module) -> list[int]:
    """What experts keep for inference, by identity."""
    return [id(form) for layer in adapted_experts(model) for form in layer._prepared._kept.values()]


@pytest.mark.parametrize("kind", MIXTURES)
def test_inference(case: Case, takes_experts: None, kind: str) -> None:
    """Without gradients experts answer from prepared branches as with them, at once and token by token"""
    model = case.trained(mixture(kind), **words(case, kind))
    for tasks in (TASKS, torch.ones(2, dtype=torch.long)):
        with torch.enable_grad():
            expected = model(input_ids=IDS, task_id=tasks).logits.detach()
        assert relative(logits(model, tasks), expected) < 1e-5
        before = prepared(model)
        assert relative(logits(model, tasks), expected) < 1e-5
        assert prepared(model) == before  # as it was kept
    assert (len(before) >= len(adapted_experts(model))) == case.prepares(tasks)
    if kind not in ("jamba", "nemotron"):  # whose Mamba blocks sum a text at once in another order
        cache, found = None, []
        for i in range(IDS.shape[1]):
            with torch.no_grad():
                out = model(input_ids=IDS[:, i : i + 1], task_id=tasks, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        assert prepared(model) == before
        assert relative(torch.cat(found, 1), expected) < 1e-5
    model.train()
    assert not prepared(model)


@KINDS
def test_rows_with_adapters_of_their_own(case: Case, takes_experts: None, kind: str) -> None:
    """adapter_names gives each row its own adapter on the experts, or none; each with its own task"""
    model = case.trained(mixture(kind), **words(case, kind))
    model.add_adapter("second", case.config(**words(case, kind, r=16, target_parameters=PRODUCTS[kind][1:])))
    model.set_adapter("second")
    second = logits(stir(model, seed=2))
    model.set_adapter("default")
    with model.disable_adapter():
        base = logits(model)
    alone = {"default": logits(model), "second": second, "__base__": base}
    for names in (["default", "second"], ["second", "__base__"], ["__base__", "default"], ["second", "second"]):
        expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                mixed = model(input_ids=IDS, task_id=TASKS, adapter_names=names).logits
            assert relative(mixed, expected) < 1e-5
    with pytest.raises(AdapterError, match=r"adapter_names.*got 1 and 2"):
        model(input_ids=IDS, task_id=TASKS, adapter_names=["default"])


@KINDS
def test_training(case: Case, takes_experts: None, kind: str) -> None:
    """Branches of experts learn, with dropout and under gradient checkpointing, and nothing else does"""
    base = mixture(kind)
    before = base_fingerprint(base)
    dropout = {"lora_dropout": 0.2} | ({"head_dropout": 0.3} if case.name in ("rlora", "mlora") else {})
    grads: list[dict[str, Tensor]] = []
    for reentrant in (None, False, True):
        model = stir(case.adapt(mixture(kind), **words(case, kind, **dropout)))
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(4)
        ids = torch.arange(3, 17).view(2, 7)
        model(input_ids=ids, labels=ids, task_id=TASKS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in grads[0].items() if "experts" in name)
    for other in grads[1:]:
        assert all(torch.allclose(grad, grads[0][name], atol=1e-5) for name, grad in other.items())
    model = case.adapt(base, **words(case, kind, **dropout))
    history = train(model, steps=8, lr=0.02)
    assert history[-1] < history[0] - 0.05
    assert base_fingerprint(model) == before


def test_half_precision(case: Case, takes_experts: None) -> None:
    """In bfloat16 experts with branches in float32 answer within rounding, and train"""
    expected = logits(case.trained(mixture("mixtral"), **words(case, "mixtral")))
    model = case.trained(mixture("mixtral", torch.bfloat16), **words(case, "mixtral"))
    assert {part.dtype for layer in adapted_experts(model) for part in layer.parts("default").values()} == {
        torch.float32
    }
    found = logits(model)
    assert found.dtype == torch.bfloat16
    # of most tokens: one between two experts may choose the other, and changes by as much as they differ
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.03
    train(model, steps=1)
    assert fingerprint(dict(model.named_parameters()))
