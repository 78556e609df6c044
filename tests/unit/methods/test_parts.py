"""A method spelled out from the parts: every sensible choice works, the others are refused, known methods come out."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import multiflora
from multiflora import ConfigError, ExportError, PartsConfig
from multiflora.methods import build_config, merges
from multiflora.methods.parts import GATES, STEMS

SHARED = {"r": 2, "target_modules": ["0", "2"], "num_tasks": 2, "lora_dropout": 0.0}


def allowed():
    """All choices of stem, heads, gate, offset, matrix and sparse routing that the config takes."""
    for stem, heads, gate, offset, matrix, core, top_k in product(
        STEMS, ("zero", "random"), GATES, (False, True), ("none", "diagonal"), ("none", "full"), (None, 2)
    ):
        words = {"stem": stem, "heads": heads, "gate": gate, "offset": offset, "task_matrix": matrix, "top_k": top_k}
        words |= {"core": core}
        words |= {"router_init": "zero"} if offset and gate in ("token", "stem") else {}
        try:
            PartsConfig(**words)
        except ConfigError:
            continue
        yield words


ALLOWED = list(allowed())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))


def test_there_are_many():
    assert {words["gate"] for words in ALLOWED} == set(GATES)
    assert {(words["stem"], words["offset"]) for words in ALLOWED} == {*product(STEMS, (False, True))} - {
        ("blended", True)
    }
    assert len(ALLOWED) == 47


@pytest.mark.parametrize("words", ALLOWED, ids=lambda words: "-".join(map(str, words.values())))
def test_it_starts_as_the_base_learns_saves_and_merges_or_says_why_not(words, tmp_path):
    base = net()
    x, tasks = torch.randn(6, 12), torch.arange(6) % 2
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), PartsConfig(**words, **SHARED))
    assert torch.allclose(model.eval()(x, task_id=tasks), base(x), atol=1e-6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    history = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(x, task_id=tasks).square().mean()
        loss.backward()
        optimizer.step()
        history.append(float(loss))
    assert history[-1] < history[0]
    kept = model.eval()(x, task_id=tasks)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x, task_id=tasks), kept)
    how = merges("parts", words)
    if how == "no":
        with pytest.raises(ExportError, match="A parts adapter cannot be merged: its router reads the input"):
            model.merge_and_unload()
        return
    with multiflora.task(model, 1):
        merged = model.merge_and_unload()
    rows = slice(None) if how == "exactly" else tasks == 1
    assert torch.allclose(merged(x)[rows], kept[rows], atol=1e-5)
    assert how == ("per task" if words["gate"].startswith("task") or words["task_matrix"] != "none" else "exactly")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("hydralora", {"num_heads": 3}, {}),
        ("loramoe", {"num_experts": 3}, {"stem": "own"}),
        ("mixlora", {"num_experts": 4}, {"stem": "own", "num_heads": 4, "top_k": 2, "router_init": "normal"}),
        ("multilora", {}, {"stem": "own", "heads": "random", "gate": "scale"}),
        ("rlora", {"head_dropout": 0.0}, {"heads": "random", "router_init": "zero", "offset": True}),
        ("mlora", {"head_dropout": 0.0}, {"heads": "random", "gate": "mean", "offset": True}),
        ("mtllora", {"temperature": 0.5}, {"gate": "task", "task_matrix": "full", "temperature": 0.5}),
    ],
)
def test_known_methods_come_out(name, settings, words):
    torch.manual_seed(1)
    known = get_peft_model(net(), build_config(name, SHARED | {"lora_alpha": 16} | settings)).eval()
    torch.manual_seed(1)
    spelled = get_peft_model(net(), PartsConfig(**SHARED, **words)).eval()
    torch.manual_seed(2)
    for index in (0, 2):
        own, theirs = (model.base_model.model[index].parts("default") for model in (spelled, known))
        assert own.keys() == theirs.keys()
        for part, tensor in own.items():
            assert torch.equal(tensor, theirs[part]), part
            tensor.data.add_(0.1 * torch.randn(tensor.shape))
            theirs[part].data.copy_(tensor)
    x, tasks = torch.randn(6, 12), torch.arange(6) % 2
    assert torch.equal(spelled(x, task_id=tasks), known(x, task_id=tasks))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gate": "mean", "top_k": 2}, r"top_k belong to a router, and gate is 'mean'"),
        ({"stem": "own", "task_matrix": "full"}, "task_matrix stands after a shared A, and stem is 'own'"),
        ({"gate": "scale"}, "gate='scale' starts at 0; with heads='zero' nothing would get a gradient"),
        ({"heads": "random"}, "heads='random' with gate='token' would not start as the base model"),
        ({"offset": True}, "offset takes a random start off; with heads='zero' and gate='token' there is none"),
        ({"heads": "random", "offset": True, "gate": "task"}, "offset takes off what equal weights make of the heads"),
        ({"heads": "random", "offset": True}, "offset takes off what equal weights make of the heads"),
        ({"top_k": 2, "router_init": "zero"}, "router_init='zero' prefers no head, so top_k could not choose"),
        ({"gate": "sum"}, "keep all heads identical for ever"),
        ({"gate": "tokens"}, "gate is 'tokens'; it must be one of 'sum', 'mean', 'scale', 'token', 'stem', 'largest'"),
        ({"top_k": 1}, "top_k is 1; it must be a whole number from 2 to one less than num_heads"),
        ({"router_balance_loss": 0.1}, "balances which heads are chosen, and without top_k all are: set top_k"),
        ({"gate": "task", "router_entropy_loss": -1.0}, "router_entropy_loss belong to a router, and gate is 'task'"),
        ({"gate": "sum", "num_heads": 1, "orthogonality_loss": 0.1}, "compares heads, and num_heads is 1"),
        ({"core": "full", "stem": "own"}, "core stands after a shared A, and stem is 'own'"),
        ({"core": "full", "stem": "blended"}, "core stands after a shared A, and stem is 'blended'"),
        ({"core": "full", "task_matrix": "full"}, "task_matrix and core stand in one place"),
        ({"core": "full", "num_cores": 1}, "num_cores is 1, and a router blends two or more"),
        ({"core": "full", "router_init": "zero"}, "would keep all core matrices alike for ever"),
        ({"core": "half"}, "core is 'half'; it must be one of 'none', 'full', 'diagonal'"),
        ({"stem": "blended"}, "stem='blended' has the router on x, and gate='token' would be another: set gate='stem'"),
        ({"stem": "blended", "gate": "stem", "num_stems": 1}, "num_stems is 1, and a router blends two or more"),
        (
            {"stem": "blended", "heads": "random", "gate": "mean", "offset": True},
            "offset takes off one A, and stem='blended' has several",
        ),
        ({"stem": "blended", "gate": "mean"}, "keep all heads identical for ever"),
        ({"gate": "stem", "stem": "own"}, "gate='stem' looks at the A x that all heads read, and stem is 'own'"),
        ({"gate": "largest", "top_k": 2}, "gate='largest' compares each head's own A x, and stem is 'shared'"),
        ({"gate": "largest", "stem": "own"}, "gate='largest' needs to know how many heads take part: set top_k"),
        ({"gate": "largest", "stem": "own", "top_k": 2, "router_z_loss": 1.0}, "router_z_loss belong to a router"),
        ({"gate": "sum", "stem": "own", "router_scores": "sigmoid"}, "router_scores belong to a router"),
        ({"stem_init": "sparse"}, "fills top_k/num_heads of each row, and top_k is not given"),
        ({"orthogonality_loss": -0.1}, "orthogonality_loss is -0.1; it must be a number of at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        PartsConfig(**words)


def test_two_adapters_of_different_parts_live_on_one_model():
    torch.manual_seed(1)
    model = get_peft_model(net(), PartsConfig(**SHARED), adapter_name="routed")
    model.add_adapter("scaled", PartsConfig(**SHARED, stem="own", heads="random", gate="scale"))
    layer = model.base_model.model[0]
    assert set(layer.parts("routed")) == {"A", "B", "router"}
    assert set(layer.parts("scaled")) == {"A", "B", "scale"}
    model.set_adapter("scaled")
    assert isinstance(model.merge_and_unload(), nn.Sequential)


def test_top_k_for_every_router_method():
    for name in ("hydralora", "loramoe", "rlora"):
        heads = "num_experts" if name == "loramoe" else "num_heads"
        words = {heads: 4, "top_k": 2, "router_balance_loss": 0.1}
        words |= {"init_weights": "zero", "router_init": "kaiming"} if name == "rlora" else {}
        model = get_peft_model(net(), build_config(name, {"r": 2, "target_modules": ["0"], **words}))
        seen = []
        model.base_model.model[0].routing.recorder = lambda layer, gate, tasks, seen=seen: seen.append(gate)
        model.train()(torch.randn(5, 12))
        assert ((seen[0] > 0).sum(1) == 2).all()
        assert torch.allclose(seen[0].sum(1), torch.ones(5))
        assert multiflora.auxiliary_loss(model) >= 0.1 * 0.9
    with pytest.raises(ConfigError, match="top_k leaves heads out from the first step"):
        build_config("rlora", {"num_heads": 4, "top_k": 2})


def test_align_lora_needs_tasks_in_training_and_not_after(tmp_path):
    base = net()
    config = multiflora.AlignLoraConfig(r=2, target_modules=["0", "2"], task_names=["a", "b"])
    model = get_peft_model(copy.deepcopy(base), config)
    x, tasks = torch.randn(8, 12), torch.arange(8) % 2
    with pytest.raises(multiflora.AdapterError, match="needs the task of each row"):
        model.train()(x)
    model.train()(x, task_id=tasks)
    from multiflora.methods.losses import alignment

    layers = [model.base_model.model[index] for index in (0, 2)]
    hidden = torch.tanh(base[0](x))
    wanted = [
        alignment(inputs @ layer.parts("default")["A"].t(), tasks, 2, None)
        for layer, inputs in zip(layers, (x, hidden), strict=True)
    ]
    assert multiflora.auxiliary_loss(model).item() == pytest.approx(0.2 * float(sum(wanted)) / 2, rel=1e-4)
    multiflora.auxiliary_loss(model).backward()
    assert all(layer.parts("default")["A"].grad.any() for layer in layers)
    model.eval()(x)
    assert isinstance(model.merge_and_unload(), nn.Sequential)
    with pytest.raises(multiflora.AdapterError, match="num_tasks is None"):
        get_peft_model(copy.deepcopy(base), multiflora.AlignLoraConfig(target_modules=["0"]))
