"""The routers' health in the log: right under accumulation and checkpointing, no wait for the device, and an alarm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multiflora.context import Routing, find
from multiflora.methods import build_config
from multiflora.methods.head_load import LayerRouting, RoutingCounter
from multiflora.training.watch import RoutingWatch, figures_of
from tests.unit.training.test_trainer import make_model, make_trainer

HYDRA = {"num_heads": 3, "lora_dropout": 0.0, "target_modules": ["up_proj", "q_proj"], "task_names": ["a", "b", "c"]}
KEYS = ("routing/entropy", "routing/least_load", "routing/most_load", "routing/dead_heads")


def watched(gates: list[list[list[float]]]) -> RoutingWatch:
    """A watch that has seen one window: a gate for each layer."""
    watch = RoutingWatch(Routing())
    with watch.listening():
        for number, gate in enumerate(gates):
            watch.routing.recorder(f"layer{number}", torch.tensor(gate), None)
    return watch


def first_figures(folder: Path, **settings: Any) -> dict[str, float]:
    """The first log line's figures: of a window whose gates are those of the start."""
    trainer = make_trainer(make_model(build_config("hydralora", HYDRA)), folder, **{"max_steps": 1, **settings})
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    return {key: line[key] for key in KEYS}


def test_figures_of_known_gates():
    layers = {
        "even": LayerRouting(load=[0.5, 0.5], by_task=[], entropy=1.0),
        "one-sided": LayerRouting(load=[0.98, 0.02], by_task=[], entropy=0.2),
    }
    assert figures_of(layers) == pytest.approx(dict(zip(KEYS, (0.6, 0.04, 1.96, 1.0), strict=True)))


def test_the_figures_do_not_depend_on_how_a_step_is_cut_or_computed(tmp_path: Path) -> None:
    whole = first_figures(tmp_path, per_device_train_batch_size=8)
    cut = first_figures(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    again = first_figures(tmp_path, per_device_train_batch_size=8, gradient_checkpointing=True)
    assert 0 < whole["routing/least_load"] < 1 < whole["routing/most_load"] < 3
    assert cut == pytest.approx(whole, rel=1e-5)
    assert again == pytest.approx(whole, rel=1e-5)


def test_what_checkpointing_computes_again_is_not_counted_again() -> None:
    model = make_model(build_config("hydralora", HYDRA)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    routing = find(model)
    assert routing is not None
    watch = RoutingWatch(routing)
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with watch.listening():
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert {float(sums[-1, -1]) for sums in watch._counter.sums.values()} == {8.0}
    assert len(watch._counter.sums) == 4


def test_a_step_never_waits_for_the_device() -> None:
    class Waits(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    routing = Routing()
    routing._mask = torch.ones(2, 3, dtype=torch.long)
    counter = RoutingCounter(routing, num_tasks=2)
    with Waits() as waits:
        for _ in range(2):
            counter("layer", torch.full((6, 2), 0.5), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert waits.seen
    assert not [name for name in waits.seen if "local_scalar" in name or "nonzero" in name or "is_nonzero" in name]


def test_layers_of_several_numbers_of_heads_and_processes_add_up() -> None:
    counter = RoutingCounter(Routing())
    counter("two", torch.tensor([[0.5, 0.5]]), None)
    counter("three", torch.tensor([[1.0, 0.0, 0.0]]), None)
    found = counter.result(lambda sums: 2 * sums)  # two processes that saw the same
    assert found["two"].load == [0.5, 0.5]
    assert found["three"].dead == [1, 2]


def test_a_head_that_dies_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = watched([[[0.5, 0.5]], [[0.99, 0.01]]])
    with caplog.at_level(logging.WARNING):
        figures = watch.close(lambda sums: sums)
        assert figures["routing/dead_heads"] == 1
        for _ in range(2):
            with watch.listening():
                watch.routing.recorder("layer1", torch.tensor([[0.99, 0.01]]), None)
            watch.close(lambda sums: sums)
    [alarm] = [record.getMessage() for record in caplog.records]
    assert alarm.startswith("Head 1 of layer1 (of 4 heads) died: its load in this window was 0.02 of an equal one")


def test_a_dying_head_raises_the_alarm_in_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(build_config("hydralora", HYDRA))
    with torch.no_grad():  # one router that follows the sign of a sum: for each token one of two heads, never the third
        for name, weight in model.named_parameters():
            if "layers.1.mlp.up_proj" in name and "router" in name:
                weight.copy_(torch.tensor([[50.0], [-50.0], [0.0]]).expand_as(weight))
    trainer = make_trainer(model, tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="multiflora"):
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["routing/dead_heads"] for line in lines] == [1, 1]
    alarms = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert len(alarms) == 1
    assert "Head 2 of " in alarms[0]
    assert "layers.1.mlp.up_proj" in alarms[0]


def test_methods_without_gates_have_no_figures(tmp_path: Path) -> None:
    for adapter in (None, build_config("multilora", {"target_modules": ["up_proj"]})):
        trainer = make_trainer(make_model(adapter), tmp_path, max_steps=1)
        trainer.train()
        assert not [key for line in trainer.state.log_history for key in line if key.startswith("routing")]
