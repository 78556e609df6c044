"""What a method needs from a training: only fresh adapters in use are touched, from the first rows of the data."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from multiflora import DeltaLoraConfig, HydraLoraConfig, LoraGaConfig, training_callbacks
from multiflora.methods.layer import BranchLinear

IDS = torch.arange(1, 41).view(8, 5)
ROWS = [
    {"input_ids": row, "labels": row, "row_length": 5, "example": i, "loss_weight": 1.0} for i, row in enumerate(IDS)
]


def collate(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    extra = {key: torch.tensor([row[key] for row in rows]) for key in ("row_length", "example", "loss_weight")}
    return {"input_ids": ids, "labels": ids, **extra}


def begin(callback, model, step=0, batch_size=2):
    loader = DataLoader(ROWS, 4, shuffle=True, collate_fn=collate)
    arguments = SimpleNamespace(train_batch_size=batch_size)
    state = TrainerState(global_step=step)
    callback.on_train_begin(arguments, state, TrainerControl(), model=model, train_dataloader=loader)


def starts(model, name="default"):
    return [layer.parts(name)["A"].clone() for layer in model.modules() if isinstance(layer, BranchLinear)]


def loraga(tiny_llama, **more):
    torch.manual_seed(0)
    words = {"r": 2, "target_modules": ["q_proj", "up_proj"], "gradient_batches": 2}
    return get_peft_model(tiny_llama(), LoraGaConfig(**words | more))


def test_most_methods_need_nothing(tiny_llama):
    model = get_peft_model(tiny_llama(), HydraLoraConfig(target_modules=["q_proj"]))
    assert training_callbacks(model) == []
    assert len(training_callbacks(loraga(tiny_llama))) == 1
    assert len(training_callbacks(get_peft_model(tiny_llama(), DeltaLoraConfig(target_modules=["q_proj"])))) == 1


def test_the_start_is_that_of_the_first_rows_whatever_the_trainer_s_order(tiny_llama):
    from multiflora import start_from_gradients

    model, other = loraga(tiny_llama), loraga(tiny_llama)
    fresh = starts(model)
    begin(training_callbacks(model)[0], model)
    start_from_gradients(other, [{"input_ids": IDS[i : i + 2], "labels": IDS[i : i + 2]} for i in (0, 2)])
    assert all(torch.equal(a, b) for a, b in zip(starts(model), starts(other), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts(model), fresh, strict=True))


def test_a_training_that_goes_on_keeps_its_start(tiny_llama):
    model = loraga(tiny_llama)
    fresh = starts(model)
    begin(training_callbacks(model)[0], model, step=3)
    assert all(torch.equal(a, b) for a, b in zip(starts(model), fresh, strict=True))


def test_delta_lora_notes_where_its_weight_begins_to_move(tiny_llama):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), DeltaLoraConfig(start_step=2, target_modules=["q_proj"]))
    layer = next(layer for layer in model.modules() if isinstance(layer, BranchLinear))
    [callback] = training_callbacks(model)
    begin(callback, model)
    kept = []
    for step in (1, 2, 3):
        with torch.no_grad():
            layer.parts("default")["B"].add_(1)
        callback.on_step_end(None, TrainerState(global_step=step), TrainerControl(), model=model)
        kept.append(float(layer.parts("default")["B0"][0, 0]))
    assert kept == [1, 2, 2]
