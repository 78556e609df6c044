"""Task conflict: gradients against autograd on the whole loss, cosines and groups with known answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multiflora.analysis.conflict import gradient_cosines, group_tasks, task_gradients
from multiflora.data.collate import pad_batch
from multiflora.methods import build_config


def example(ids, prompt, task):
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "task_id": task}


@pytest.mark.parametrize("method", ["lora", "rlora", "moelora"])
def test_the_gradient_is_that_of_the_mean_loss_per_token(tiny_llama, method):
    from peft import get_peft_model

    torch.manual_seed(0)
    settings = {"target_modules": "all-linear"} | ({"task_names": ["a", "b"]} if method != "lora" else {})
    model = get_peft_model(tiny_llama(), build_config(method, settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    rows = [example([3, 4, 5, 6, 7], 2, 1), example([8, 9, 10], 1, 1), example([11, 12, 13, 14], 3, 1)]
    batches = [pad_batch(rows[:2], pad_token_id=0), pad_batch(rows[2:], pad_token_id=0)]
    found = task_gradients(model, {"b": batches})["b"]

    whole = pad_batch(rows, pad_token_id=0)
    routed = {} if method == "lora" else {"task_id": whole["task_id"]}
    logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], **routed).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), whole["labels"][:, 1:].flatten(), ignore_index=-100).backward()
    for ours, p in zip(found, [p for p in model.parameters() if p.requires_grad], strict=True):
        assert torch.allclose(ours, p.grad, atol=1e-6)


def test_cosines_of_known_gradients():
    one, two = torch.tensor([1.0, 1.0]), torch.tensor([[2.0]])
    gradients = {
        "a": [one, two],
        "b": [-one, -two],
        "c": [torch.tensor([1.0, -1.0]), 0 * two],
        "zero": [0 * one, 0 * two],
    }
    cosines = gradient_cosines(gradients)
    assert cosines[0] == pytest.approx([1, -1, 0, 0])
    assert cosines[3] == [0, 0, 0, 0]
    assert all(cosines[i][j] == cosines[j][i] for i in range(4) for j in range(4))


def test_tasks_that_agree_are_grouped():
    cosines = [[1, 0.4, -0.3, 0.0], [0.4, 1, -0.2, 0.0], [-0.3, -0.2, 1, 0.6], [0.0, 0.0, 0.6, 1]]
    assert sorted(map(sorted, group_tasks(["a", "b", "c", "d"], cosines))) == [["a", "b"], ["c", "d"]]


def test_tasks_without_anything_in_common_stay_apart():
    identity = [[1.0, 0.0], [0.0, 1.0]]
    assert len(group_tasks(["a", "b"], identity)) == 2
    assert group_tasks(["a"], [[1.0]]) == [["a"]]
