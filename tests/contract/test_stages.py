"""The contract of a second training: what was learned stays, whatever a trainer is asked to do first."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from contract.cases import IDS, TASKS, layers, logits
from multiflora import training_callbacks


class Rows(Dataset):
    """Two rows with their tasks."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": IDS[i], "task_id": TASKS[i]}


def stage(model, folder, rate, steps=2):
    """One training with transformers' Trainer and what the methods ask of it."""
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=rate, report_to=[], remove_unused_columns=False, use_cpu=True,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        weight_decay=0.0,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows(), callbacks=training_callbacks(model)).train()
    return model


def settings(case):
    """Small enough for the layers of the model, and with what a method waits for at the beginning."""
    more = {"start_step": 1} if case.name == "deltalora" else {}
    return more | ({"r": 2} if case.name == "loraga" else {})


def test_a_second_stage_goes_on_from_the_first(case, tiny_llama, tmp_path):
    """A saved adapter, trained on at rate 0, is what it was; so is its neighbour that is not in use."""
    model = stage(case.adapt(tiny_llama(), lora_dropout=0.0, **settings(case)), tmp_path / "first", 0.05)
    learned = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    assert torch.allclose(logits(again), learned, atol=1e-6)
    again.load_adapter(tmp_path / "adapter", "neighbour")
    stage(again, tmp_path / "second", 0.0)
    assert torch.allclose(logits(again), learned, atol=1e-6)
    again.set_adapter("neighbour")
    assert torch.allclose(logits(again), learned, atol=1e-6)


def test_a_fresh_neighbour_is_left_alone(case, tiny_llama, tmp_path):
    """A fresh adapter that is not in use keeps its start while another is trained."""
    model = case.adapt(tiny_llama(), **settings(case))
    model.add_adapter("neighbour", case.config(**settings(case)))
    before = {name: part.clone() for layer in layers(model) for name, part in of(layer, "neighbour")}
    stage(model, tmp_path, 0.05, steps=1)
    after = dict(pair for layer in layers(model) for pair in of(layer, "neighbour"))
    assert all(torch.equal(after[name], part) for name, part in before.items())


def of(layer, adapter):
    """An adapter's tensors on a layer, by a name that is the layer's own."""
    return [(f"{layer.name}.{part}", tensor) for part, tensor in layer.parts(adapter).items()]


def test_an_adapter_that_is_not_trained_is_left_alone(case, tiny_llama, tmp_path):
    """An adapter in use that is not trained keeps its weights, whatever else is."""
    model = case.adapt(tiny_llama(), modules_to_save=["lm_head"], **settings(case))
    for layer in layers(model):
        layer.requires_grad_(False)
    before = {name: part.clone() for layer in layers(model) for name, part in of(layer, "default")}
    stage(model, tmp_path, 0.05, steps=1)
    after = dict(pair for layer in layers(model) for pair in of(layer, "default"))
    assert all(torch.equal(after[name], part) for name, part in before.items())


@pytest.mark.parametrize("stages", [1, 2])
def test_delta_lora_s_weight_stays_only_in_the_first_stage(tiny_llama, tmp_path, stages):
    """With K steps of rest, a second stage of fewer than K steps still moves the weight."""
    from contract.cases import CASES

    case = next(case for case in CASES if case.name == "deltalora")
    model = case.adapt(tiny_llama(), start_step=1)
    for number in range(stages):
        stage(model, tmp_path / str(number), 0.05, steps=2 if number == 0 else 1)
    layer = next(layers(model))
    parts = layer.parts("default")
    assert not torch.equal(parts["A"], parts["A0"])
