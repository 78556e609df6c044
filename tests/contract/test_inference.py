"""The contract of branches prepared for inference: the numbers of the general way, whatever happened meanwhile."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from mixtures import PRODUCTS, mixture
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from contract.cases import CASES, IDS, TASK_NAMES, TASKS, logits, relative, stir, train
from multiflora import task
from multiflora.methods.layer_pass import BranchLayer

CLOSE = 1e-5
"""Relative, in float32: the sums are the same, in another order."""


class Place(NamedTuple):
    """Where branches are put."""

    base: Callable[[], Any]
    words: dict[str, Any]
    """Of the config."""

    def trained(self, kind, **more):
        return kind.trained(self.base(), **self.words, **more)


@pytest.fixture(params=["linear layers", "experts"])
def place(request, tiny_llama):
    """The linear layers of a model, or the fused experts of a mixture."""
    if request.param == "linear layers":
        return Place(tiny_llama, {})
    words = {"target_modules": [], "target_parameters": PRODUCTS["mixtral"], "r": 8}
    return Place(lambda: mixture("mixtral"), words)


def layers(model):
    """All adapted layers."""
    return (module for module in model.modules() if isinstance(module, BranchLayer))


def general(model, tasks=TASKS):
    """The logits with gradients on, so that nothing is prepared."""
    model.eval()
    words = {} if tasks is None else {"task_id": tasks}
    return model(input_ids=IDS, **words).logits.detach()


def kept(model):
    """All prepared forms."""
    return [form for layer in layers(model) for form in layer._prepared._kept.values()]


@pytest.mark.parametrize("tasks", [TASKS, torch.tensor([1, 1]), torch.tensor([0])], ids=["mixed", "one", "single"])
def test_prepared_is_general(case, tiny_llama, tasks):
    """Without gradients the numbers are those with them, for rows of one task and of several."""
    model = case.trained(tiny_llama())
    expected = general(model, tasks)
    assert not kept(model)
    assert relative(logits(model, tasks), expected) < CLOSE
    before = [id(form) for form in kept(model)]
    assert relative(logits(model, tasks), expected) < CLOSE
    assert [id(form) for form in kept(model)] == before  # as it was kept
    assert bool(kept(model)) == case.prepares(tasks)


def test_token_by_token(case, tiny_llama):
    """With a cache, tokens one at a time are as all at once."""
    model = case.trained(tiny_llama())
    expected = general(model)
    cache, found = None, []
    with torch.no_grad():
        for i in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, i : i + 1], task_id=TASKS, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    assert relative(torch.cat(found, 1), expected) < CLOSE


def test_training_gives_the_memory_back(case, tiny_llama):
    """Prepared forms are gone while the model is trained."""
    model = case.trained(tiny_llama())
    logits(model)
    model.train()
    assert not kept(model)


def _first(model):
    """A trained tensor of an adapted layer."""
    return next(parameter for layer in layers(model) for parameter in layer.parameters() if parameter.requires_grad)


def _in_place(model):
    with torch.no_grad():
        _first(model).mul_(-2)


def _in_inference_mode(model):
    with torch.inference_mode():
        _first(model).mul_(-2)


def _through_data(model):
    _first(model).data.mul_(-2)


def _other_data(model):
    parameter = _first(model)
    parameter.data = parameter.data * -2


def _other_parameter(model):
    layer = next(layers(model))
    place = layer._weights("A")
    place["default"] = torch.nn.Parameter(place["default"].detach() * -2)


def _step(model):
    train(model, steps=1, lr=0.1)


def _state_dict(model):
    state = {name: value * -2 for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)


def _scaling(model):
    for layer in layers(model):
        layer.scaling["default"] *= -2


def _moved(model):
    return model.to(torch.float64)


def _moved_and_back(model):
    model.to(torch.float64)
    _first(model).data.mul_(-2)
    model.to(torch.float32)


def _copied(model):
    other = copy.deepcopy(model)
    assert not kept(other)
    _in_place(other)
    return other


def _pickled(model):
    other = pickle.loads(pickle.dumps(model))
    assert not kept(other)
    _in_place(other)
    return other


def _merged_and_changed(model):
    with task(model, TASK_NAMES[0]):
        model.merge_adapter()
        logits(model)
        model.unmerge_adapter()
    _in_place(model)


CHANGES = {
    "in place": _in_place,
    "in inference mode": _in_inference_mode,
    "through .data": _through_data,
    "other .data": _other_data,
    "other parameter": _other_parameter,
    "optimiser step": _step,
    "state dict": _state_dict,
    "scaling": _scaling,
    ".to()": _moved,
    ".to() and back": _moved_and_back,
    "deep copy": _copied,
    "pickle": _pickled,
}

OF = {case.name: case for case in CASES}
KINDS = [OF[name] for name in ("multilora", "rlora", "mtllora", "moelora")]
"""A constant gate, a router, a table with a matrix for each task, a table alone."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=[case.name for case in KINDS])
def test_a_change_is_seen(kind, place, change):
    """Whatever changes an adapter, what was prepared of it is made anew."""
    model, one = place.trained(kind), torch.tensor([1, 1])
    before = logits(model, one)
    changed = CHANGES[change](model) or model
    assert relative(logits(changed, one), general(changed, one)) < CLOSE
    if change != ".to()":
        assert relative(logits(changed, one).float(), before) > 1e-3


def test_a_change_in_the_middle_of_an_answer(place):
    """A pass that goes on with a cache does not read all bytes again, and sees a change in place."""
    model = place.trained(OF["rlora"])
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        other, third = copy.deepcopy(cache), copy.deepcopy(cache)
        words = {"input_ids": IDS[:, 3:4], "use_cache": True}
        before = model(**words, past_key_values=third).logits
        _in_place(model)
        found = model(**words, past_key_values=cache).logits
    assert relative(found, model(**words, past_key_values=other).logits.detach()) < CLOSE
    assert relative(found, before) > 1e-4


def test_a_gate_of_each_layer(place):
    """Rows of several tasks are weighted by their own layer's table, and by their own expert's."""
    model = place.trained(OF["moelora"], shared_gate=False)
    found = logits(model)
    assert any(form.table is not None for form in kept(model))
    assert relative(found, general(model)) < CLOSE


@pytest.mark.parametrize("kind", KINDS[:1], ids=["multilora"])
def test_merging(kind, place):
    """A merged layer is plain; unmerged, and changed meanwhile, it is prepared anew."""
    model = place.trained(kind)
    before = logits(model)
    model.merge_adapter()
    assert relative(logits(model), before) < 1e-4
    model.unmerge_adapter()
    _in_place(model)
    assert relative(logits(model), general(model)) < CLOSE


@pytest.mark.parametrize("kind", KINDS, ids=[case.name for case in KINDS])
def test_other_adapters(kind, place, tmp_path):
    """set_adapter, load_adapter under a name that was there, and both adapters in one batch."""
    model = place.trained(kind, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    first = logits(model)
    model.add_adapter("other", kind.config(**place.words, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    stir(model, seed=5)
    other = logits(model)
    assert relative(other, first) > 1e-3
    assert relative(other, general(model)) < CLOSE
    model.set_adapter("default")
    assert relative(logits(model), first) < CLOSE
    mixed = logits(model, TASKS, adapter_names=["other", "default"])
    assert relative(mixed, torch.stack((other[0], first[1]))) < CLOSE
    model.delete_adapter("other")
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert relative(logits(model), first) < CLOSE


def test_settings_of_a_gate(place):
    """A temperature that is set later holds."""
    kind = OF["mtllora"]
    model, one = place.trained(kind), torch.tensor([1, 1])
    before = logits(model, one)
    model.peft_config["default"].temperature = 0.01
    assert relative(logits(model, one), general(model, one)) < CLOSE
    assert relative(logits(model, one), before) > 1e-4


def test_inside_a_pass_of_its_own(tiny_llama):
    """A layer that is called by itself sees a change through .data, too."""
    model = OF["rlora"].trained(tiny_llama())
    layer = next(layers(model))
    x = torch.randn(1, 3, layer.in_features)
    with torch.no_grad():
        before = layer(x)
        layer._weights("A")["default"].data.mul_(-2)
        assert relative(layer(x), before) > 1e-3


def test_weights_made_in_inference_mode(place):
    """torch does not count the changes of such weights, so nothing is prepared of them."""
    with torch.inference_mode():
        model = place.trained(OF["rlora"])
        before = logits(model)
        _first(model).mul_(-2)
        assert relative(logits(model), before) > 1e-3
    assert not kept(model)


@pytest.mark.parametrize("kind", KINDS[2:], ids=["mtllora", "moelora"])
def test_two_threads(kind, place):
    """Two threads with a task each get their own task's numbers."""
    model = place.trained(kind)
    expected = [general(model, torch.tensor([number])) for number in (0, 1)]
    wrong = []

    def ask(number):
        with task(model, TASK_NAMES[number]):
            for _ in range(20):
                if relative(logits(model, None), expected[number]) > CLOSE:
                    wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS[:2], ids=["multilora", "rlora"])
def test_static_cache(kind, place):
    """Generation with a cache of fixed size is generation with a growing one."""
    model = place.trained(kind, task_type="CAUSAL_LM")
    settings = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, cache_implementation="static"), expected)
    assert isinstance(model, PeftModel)
