"""The contract of training."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from contract.cases import IDS, TASKS, base_fingerprint, layers, logits, loss, relative, stir, train
from multiflora import task
from multiflora.context import find
from multiflora.peft_bridge import prefix


def gradients(model):
    """Of all adapter weights, from one batch under the same random numbers."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    loss(model).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_step_zero_is_the_base_model(case, tiny_llama):
    """A fresh adapter is the base model."""
    base = logits(tiny_llama(), None)
    assert relative(logits(case.adapt(tiny_llama())), base) < 1e-6


def test_only_adapter_weights_train(case, tiny_llama):
    """Only adapter weights are trainable."""
    model = case.adapt(tiny_llama())
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(f".{prefix(case.name)}" in name for name in trainable)
    adapted = list(layers(model))
    assert len(adapted) == 14
    shared = case.method.shared(case.config())
    expected = sum(
        torch.Size(shape).numel()
        for layer in adapted
        for part, shape in case.method.shapes(
            layer.configs["default"], layer.ranks["default"], layer.in_features, layer.out_features
        ).items()
        if part not in shared or "default" not in layer.holders
    )
    assert sum(weight.numel() for weight in trainable.values()) == expected


def test_training_learns_and_leaves_the_base_alone(case, tiny_llama):
    """Training lowers the loss; the base's weights stay byte for byte."""
    base = tiny_llama()
    before = base_fingerprint(base)
    model = case.adapt(base)
    history = train(model, steps=8, lr=0.02)
    assert history[-1] < history[0] - 0.05
    assert base_fingerprint(model) == before
    assert base_fingerprint(model.unload()) == before


def test_every_adapter_weight_gets_a_gradient(case, tiny_llama):
    """Every adapter weight gets a gradient, also with dropout."""
    model = stir(case.adapt(tiny_llama(), lora_dropout=0.2))
    for name, grad in gradients(model).items():
        assert torch.isfinite(grad).all(), name
        assert grad.abs().sum() > 0, name


class Rows(Dataset):
    """What a data set for Trainer looks like, with each row's task."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": IDS[i], "task_id": TASKS[i]}


def test_trainer(case, tiny_llama, tmp_path):
    """transformers' Trainer trains it, task_id as one more column."""
    model = case.adapt(tiny_llama())
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.01, report_to=[], remove_unused_columns=False, use_cpu=True,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows()).train()
    moved = [
        name for name, weight in model.named_parameters() if name in before and not torch.equal(weight, before[name])
    ]
    assert len(moved) >= len(before) / 2


class Perceptron(nn.Module):
    """No transformer, no config, inputs of rank two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        """Two layers."""
        return self.second(torch.relu(self.first(x)))


def test_plain_module(case):
    """Any nn.Module in a plain PyTorch loop."""
    torch.manual_seed(2)
    x, y = torch.randn(24, 8), torch.randn(24, 3)
    model = case.adapt(Perceptron(), target_modules=["first", "second"], lora_dropout=0.0)
    assert torch.allclose(model(x, task_id=torch.zeros(24, dtype=torch.long)), Perceptron()(x), atol=1e-6)
    optimizer = torch.optim.Adam((weight for weight in model.parameters() if weight.requires_grad), lr=0.03)
    model.train()
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        error = (model(x, task_id=torch.arange(24) % 2) - y).square().mean()
        error.backward()
        optimizer.step()
        history.append(float(error))
    assert history[-1] < 0.8 * history[0]


def check_checkpointing(case, tiny_llama, use_reentrant):
    # dropout on: blocks computed a second time must draw the masks of the first
    model = stir(case.adapt(tiny_llama(), lora_dropout=0.3))
    expected = gradients(model)
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-7), name


def test_gradient_checkpointing(case, tiny_llama):
    """Gradient checkpointing gives the same gradients, dropout included."""
    check_checkpointing(case, tiny_llama, use_reentrant=False)


def test_gradient_checkpointing_reentrant(case, tiny_llama):
    """Re-entrant gradient checkpointing gives the same gradients, dropout included."""
    check_checkpointing(case, tiny_llama, use_reentrant=True)


def test_task_set_outside_and_checkpointing(case, tiny_llama):
    """A task set by `with multiflora.task` holds for the recomputation in backward, too."""
    model = stir(case.adapt(tiny_llama()))
    model.train()

    def grads():
        torch.manual_seed(3)
        model.zero_grad()
        with task(model, "prose"):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]

    expected = grads()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, grad in zip(grads(), expected, strict=True):
        assert torch.allclose(found, grad, rtol=1e-4, atol=1e-7)


def test_bfloat16_base(case, tiny_llama):
    """A bfloat16 base keeps its dtype, the adapter trains in float32."""
    base = tiny_llama().to(torch.bfloat16)
    before = base_fingerprint(base)
    reference = logits(base, None)
    model = case.adapt(base)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert relative(logits(model).float(), reference.float()) < 2e-2
    assert logits(model).dtype == torch.bfloat16
    history = train(model, steps=8, lr=0.02)
    assert history[-1] < history[0] - 0.05
    assert base_fingerprint(model) == before


def test_autocast(case, tiny_llama):
    """Under autocast, outputs and float32 gradients agree with those without, as nearly as the plain loop's do.

    How much bfloat16 rounds away depends on the method (a router's weights are rounded, too), so the loop is the bound.
    """
    model = stir(case.adapt(tiny_llama(), lora_dropout=0.0, **no_head_dropout(case)))
    plain, expected = logits(model), gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, found = logits(model), gradients(model)
        find(model).loop = True
        looped, by_loop = logits(model), gradients(model)
    assert relative(mixed.float(), plain) < 1.5 * relative(looped.float(), plain)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert relative(flat(found), flat(expected)) < 1.5 * relative(flat(by_loop), flat(expected))


def no_head_dropout(case):
    """Settings that turn a method's own dropout off."""
    return {"head_dropout": 0.0} if hasattr(case.method.config, "head_dropout") else {}


def flat(tensors):
    """All in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_torch_compile(case, tiny_llama):
    """torch.compile takes it whole, without a graph break, and gives the same outputs and gradients."""
    model = stir(case.adapt(tiny_llama(num_hidden_layers=1), lora_dropout=0.0, **no_head_dropout(case)))
    eager, expected = logits(model), gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(logits(compiled), eager) < 1e-5
    model.train()
    model.zero_grad()
    compiled(input_ids=IDS, labels=IDS, task_id=TASKS).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert relative(flat(found), flat(expected)) < 1e-4
