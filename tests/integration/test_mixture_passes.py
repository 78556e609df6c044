"""What is known of a pass through a mixture: padding, tasks of generated text, what methods add to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import PRODUCTS, mixture
from peft import get_model_status, get_peft_model
from torch import Tensor

import multiflora
from multiflora.context import find, reference_loop
from multiflora.methods import build_config
from multiflora.methods.experts import AdaptedExperts
from multiflora.methods.head_load import RoutingCounter
from multiflora.methods.losses import load_balance, router_z

IDS = torch.tensor([[5, 9, 11, 3, 7, 22, 8], [41, 2, 17, 30, 6, 12, 19]])
PADDED = torch.tensor([[5, 9, 11, 3, 7, 22, 8, 0, 0], [41, 2, 17, 30, 6, 12, 19, 0, 0]])


def adapted(method: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    words = {"target_modules": [], "target_parameters": PRODUCTS["mixtral"], "task_names": ["verse", "prose"]}
    model = get_peft_model(mixture("mixtral"), build_config(method, words | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def seen_by_experts(model: Any, **batch: Any) -> tuple[Any, Tensor, Tensor]:
    """The first layer's experts, the tokens that come to them and the experts that were chosen."""
    experts = next(module for module in model.modules() if isinstance(module, AdaptedExperts))
    seen: list[Any] = []
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(**batch)
    hook.remove()
    return experts.layers()["gate_up_proj"], seen[0][0], seen[0][1]


@pytest.mark.parametrize(
    "settings", [{"router_balance_loss": 1.0}, {"router_balance_loss": 0.0, "router_z_loss": 0.5}], ids=["balance", "z"]
)
def test_a_method_s_loss_is_taken_expert_by_expert_over_real_tokens(settings: dict[str, float]) -> None:
    model = adapted("mixlora", num_experts=3, top_k=2, lora_dropout=0.0, **settings).train()
    mask = (PADDED > 0).long()
    layer, x, chosen = seen_by_experts(model, input_ids=PADDED, attention_mask=mask, labels=PADDED)
    expected = []
    for e, router in enumerate(layer.parts("default")["router"]):
        own = [t for t, row in enumerate(chosen.tolist()) if e in row]
        if own:
            logits, keep = x[own] @ router.t(), mask.reshape(-1)[own]
            best = logits.topk(2, -1).indices
            gate = torch.softmax(torch.full_like(logits, -torch.inf).scatter(1, best, logits.gather(1, best)), -1)
            balance = settings.get("router_balance_loss", 0.0) * load_balance(logits, gate, keep)
            expected.append(balance + settings.get("router_z_loss", 0.0) * router_z(logits, keep))
    routing = find(model)
    assert routing is not None
    torch.testing.assert_close(routing.losses[0], torch.stack(expected).mean())
    assert len(routing.losses) == 4
    assert multiflora.auxiliary_loss(model).requires_grad


def test_routing_is_counted_without_padding() -> None:
    model, found = adapted("rlora", num_heads=3), []
    routing = find(model)
    assert routing is not None
    for batch in ({"input_ids": IDS}, {"input_ids": PADDED, "attention_mask": (PADDED > 0).long()}):
        routing.recorder = counter = RoutingCounter(routing, num_tasks=2)
        with torch.no_grad():
            model(**batch, task_id=torch.tensor([0, 1]))
        found.append(counter.result())
    assert len(found[0]) == 4
    for name, layer in found[0].items():
        assert layer.load == pytest.approx(found[1][name].load, abs=1e-5)
        assert sum(layer.load) == pytest.approx(1, abs=1e-5)
        assert layer.by_task[0] != pytest.approx(layer.by_task[1], abs=1e-4)


@pytest.mark.parametrize("method", ["moelora", "mtllora", "rlora"])
def test_text_is_generated_with_the_task_of_each_row(method: str) -> None:
    model = adapted(method, r=8)
    words = {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(IDS)
    together = model.generate(input_ids=IDS, attention_mask=mask, task_id=["prose", "verse"], **words)
    for row, name in enumerate(("prose", "verse")):
        alone = model.generate(input_ids=IDS[row : row + 1], attention_mask=mask[:1], task_id=name, **words)
        assert torch.equal(together[row : row + 1], alone)
    beams = model.generate(input_ids=IDS, attention_mask=mask, task_id=["prose", "verse"], num_beams=2, **words)
    assert len(beams) == 2


def test_text_is_generated_with_the_adapter_of_each_row() -> None:
    model = adapted("rlora")
    settings = {"target_modules": [], "target_parameters": PRODUCTS["mixtral"][:1], "r": 4, "init_weights": False}
    model.add_adapter("two", build_config("rlora", settings | {"task_names": ["verse", "prose"]}))
    words = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        mixed = model.generate(input_ids=IDS, adapter_names=["two", "default"], **words, **more)
        for row, name in enumerate(("two", "default")):
            model.set_adapter(name)
            alone = model.generate(input_ids=IDS[row : row + 1], **words | {"attention_mask": None}, **more)
            assert torch.equal(mixed[row : row + 1], alone)
        model.set_adapter("default")


def test_peft_knows_of_the_layers() -> None:
    model = adapted("rlora")
    status = get_model_status(model)
    assert (status.num_adapter_layers, status.active_adapters) == (4, ["default"])
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_slow_sum_is_the_packed_one() -> None:
    model = adapted("mtllora", r=4)
    batch = {"input_ids": IDS, "task_id": torch.tensor([1, 0])}
    with torch.no_grad():
        packed = model(**batch).logits
        with reference_loop(model):
            torch.testing.assert_close(model(**batch).logits, packed, rtol=1e-4, atol=1e-5)


def test_a_compiled_pass_gives_the_same() -> None:
    model = adapted("rlora")
    expected = model(input_ids=IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
