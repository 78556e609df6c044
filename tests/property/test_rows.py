"""A row's output depends on that row only: not on its batch mates, its padding or their task."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from multiflora.methods import METHODS, build_config

OURS = sorted(name for name, card in METHODS.items() if card.module)
TASKS = torch.tensor([0, 1, 1, 0])


def tiny(name):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    words = {"target_modules": "all-linear", "task_names": ["a", "b"], "lora_dropout": 0.0, "init_weights": False}
    if name in ("rlora", "mlora"):
        words["head_dropout"] = 0.0
    # in float64: a dependence on other rows would be as large there, rounding is not
    return get_peft_model(LlamaForCausalLM(config), build_config(name, words)).double()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", OURS)
def test_batch_mates_and_padding_change_nothing(name, side, training):
    model = tiny(name).train(training)
    lengths = [5, 9, 7, 3]
    rows = [torch.randint(1, 50, (length,)) for length in lengths]
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions, task_id=TASKS).logits
    for i, row in enumerate(rows):
        alone = model(row[None], task_id=TASKS[i : i + 1]).logits[0]
        batched = together[i, mask[i].bool()]
        assert (batched - alone).norm() < 1e-13 * alone.norm()


@pytest.mark.parametrize("name", OURS)
def test_a_mate_of_another_task_changes_nothing(name):
    model = tiny(name).eval()
    ids = torch.randint(1, 50, (2, 6))
    first = model(ids, task_id=torch.tensor([0, 0])).logits[0]
    second = model(ids, task_id=torch.tensor([0, 1])).logits[0]
    assert torch.equal(first, second)
    gated = model(ids, task_id=torch.tensor([1, 1])).logits[0]
    assert torch.equal(first, gated) == (name not in ("moelora", "mtllora"))


@pytest.mark.parametrize("name", OURS)
def test_ids_per_token_equal_ids_per_row(name):
    model = tiny(name).eval()
    ids = torch.randint(1, 50, (2, 6))
    per_row = model(ids, task_id=torch.tensor([0, 1])).logits
    per_token = model(ids, task_id=torch.tensor([[0] * 6, [1] * 6])).logits
    assert torch.equal(per_row, per_token)


@pytest.mark.parametrize("name", ["rlora", "hydralora", "loramoe", "mlora", "multilora", "mixlora", "parts"])
def test_the_order_of_heads_is_of_no_account(name):
    model = tiny(name).eval()
    ids = torch.randint(1, 50, (2, 6))
    before = model(ids).logits
    for module in model.modules():
        if hasattr(module, "parts"):
            parts = module.parts("default")
            heads = module.method.heads(module.configs["default"])
            order = torch.randperm(heads)
            views = {"B": parts["B"].view(parts["B"].shape[0], heads, -1)}
            views["B"].data.copy_(views["B"][:, order])
            if not module.method.shared_stem:
                stems = parts["A"].view(heads, -1, parts["A"].shape[1])
                stems.data.copy_(stems[order])
            for gate in ("router", "scale"):
                if gate in parts:
                    parts[gate].data.copy_(parts[gate][order])
    assert (model(ids).logits - before).norm() < 1e-5 * before.norm()
