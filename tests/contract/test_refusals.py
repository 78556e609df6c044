"""The contract of errors: what cannot work is refused in words, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from contract.cases import CASES, IDS, base_fingerprint, layers, logits
from multiflora import AdapterError, ConfigError, task


def check_untouched(base, state):
    """No layer replaced, no weight changed, no hook left."""
    assert not list(layers(base))
    assert not base._forward_pre_hooks
    assert base_fingerprint(base) == state
    assert all(weight.requires_grad for weight in base.parameters())


def needs_task(case):
    """Skips methods for which the test says nothing."""
    if not case.method.needs_task():
        pytest.skip("its output does not depend on the task")


def test_missing_task(case, tiny_llama):
    """Without a task id: an error that names the tasks, where the task decides the output."""
    needs_task(case)
    model = case.adapt(tiny_llama())
    with pytest.raises(AdapterError, match=rf"A {case.name} adapter needs the task of each row.*verse, prose"):
        model(IDS)


def test_task_id_too_large(case, tiny_llama):
    """A task id the adapter does not have: an error that names the tasks."""
    model = case.adapt(tiny_llama())
    for ids in ([0, 2], [-1, 0]):
        with pytest.raises(AdapterError, match=r"task_id goes from .* 2 tasks \(verse, prose\)"):
            model(IDS, task_id=torch.tensor(ids))


def test_unknown_task(case, tiny_llama):
    """A task name or index the adapter does not know: an error that names the tasks."""
    model = case.adapt(tiny_llama())
    for which in ("drama", 2):
        with pytest.raises(AdapterError, match=rf"no task {which!r}; its tasks are verse, prose"), task(model, which):
            pass


def test_one_task_needs_no_id(case, tiny_llama):
    """With one task no id is needed."""
    model = case.trained(tiny_llama(), task_names=["verse"])
    assert torch.equal(logits(model, None), logits(model, torch.zeros(2, dtype=torch.long)))


def test_task_names_need_not_be_ids(case, tiny_llama):
    """`with multiflora.task` by name or index equals task_id."""
    model = case.trained(tiny_llama())
    with task(model, "prose"):
        by_name = logits(model, None)
    with task(model, 1):
        by_index = logits(model, None)
    assert torch.equal(by_name, by_index)
    assert torch.equal(by_name, logits(model, torch.tensor([1, 1])))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"r": 0}, "r is 0; it must be a whole number of at least 1"),
        ({"lora_alpha": -1}, "lora_alpha is -1; it must be a number above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must be in \[0, 1\)"),
        ({"num_tasks": 0, "task_names": None}, "num_tasks is 0; it must be a whole number of at least 1"),
        ({"num_tasks": 3}, "num_tasks is 3 but task_names has 2 names"),
        ({"task_names": ["a", "a"]}, "task_names has a name twice"),
        ({"bias": "some"}, "bias is 'some'; it must be one of"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0; it must be a whole number of at least 1"),
        ({"target_parameters": ["w"], "layers_to_transform": [0]}, "does not go with target_parameters"),
        ({"num_haeds": 3}, "num_haeds is not a setting of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(case, words, message):
    """Settings that cannot work are refused by the config: field, value, range."""
    with pytest.raises(ConfigError, match=message):
        case.config(**words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"target_modules": ["nothing"]}, "not found in the base model"),
        ({"rank_pattern": {"nothing": 32}}, "rank_pattern key 'nothing' matches none of the 14 adapted modules"),
        ({"alpha_pattern": {"nothing": 4}}, "alpha_pattern key 'nothing' matches none of the 14 adapted modules"),
        ({"target_modules": ["q_proj", "norm"]}, "norm is a LlamaRMSNorm, which is not supported"),
        ({"target_parameters": ["nothing"]}, "no parameter's name is or ends in that|of linear layers alone|loss of"),
    ],
    ids=["target_modules", "rank_pattern", "alpha_pattern", "kind", "target_parameters"],
)
def test_settings_and_model(case, tiny_llama, words, message):
    """Settings that do not fit the model are refused before a module is replaced."""
    base = tiny_llama()
    state = base_fingerprint(base)
    with pytest.raises(ValueError, match=message):
        case.adapt(base, **words)
    check_untouched(base, state)


def test_no_tasks(case, tiny_llama):
    """A method gated by task is refused without a number of tasks."""
    needs_task(case)
    base = tiny_llama()
    state = base_fingerprint(base)
    with pytest.raises(AdapterError, match="num_tasks is None"):
        case.adapt(base, task_names=None)
    check_untouched(base, state)


def test_refused_second_adapter(case, tiny_llama):
    """A second adapter that is refused leaves the first as it was."""
    model = case.trained(tiny_llama())
    expected = logits(model)
    with pytest.raises(AdapterError, match="rank_pattern key 'nothing' matches none"):
        model.add_adapter("two", case.config(rank_pattern={"nothing": 32}))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.add_adapter("two", case.config())
    assert set(model.peft_config) == {"default", "two"}


def test_another_method_on_top(case, tiny_llama):
    """An adapter of another method on the same model is refused by name."""
    model = case.trained(tiny_llama())
    other = next(other for other in CASES if other.name != case.name)
    for config in (other.config(), LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("two", config)
    with pytest.raises(AdapterError, match="already carries an adapter of another kind"):
        get_peft_model(model.get_base_model(), other.config())
