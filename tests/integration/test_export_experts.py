"""An adapter gated by task alone becomes its experts, and each task's scales give that task's update again."""

from __future__ import annotations

import json

import pytest
import torch
from made_adapters import TASKS, adapted, save
from test_export_gguf import deltas

import multiflora
from multiflora import ExportError
from multiflora.export.dense import merge
from multiflora.export.gguf_lora import to_gguf
from multiflora.export.plain import read_lora


def updates(folder):
    """ΔW of every layer of a plain LoRA."""
    return {pair.name: (pair.B @ pair.A).double() for pair in read_lora(folder).pairs()}


def wanted(model, task):
    """ΔW of every layer by the method's own words, head by head: a plain loop in float64."""
    found = {}
    gate = next(module for module in model.modules() if hasattr(module, "mf_moelora_task_router"))
    rows = gate.mf_moelora_task_embedding["default"].double() @ gate.mf_moelora_task_router["default"].double().T
    weights = torch.softmax(rows[TASKS.index(task)], 0)
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "mf_moelora_A"):
            continue
        A, B = (getattr(module, f"mf_moelora_{part}")["default"].detach().double() for part in "AB")
        config, total = model.peft_config["default"], 0
        for e, weight in enumerate(weights.detach()):
            rank = A.shape[0] // len(weights)
            total = total + weight * B[:, e * rank : (e + 1) * rank] @ A[e * rank : (e + 1) * rank]
        found[name] = total * multiflora_scale(config, name, A.shape[0])
    return found


def multiflora_scale(config, name, r):
    return next((alpha for key, alpha in config.alpha_pattern.items() if name.endswith(key)), config.lora_alpha) / r


@pytest.fixture
def experts(tiny_llama, tmp_path):
    """A MOELoRA of four experts, whose ranks and scales differ among the layers; and its folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    settings = {"num_experts": 4, "r": 8, "rank_pattern": {"k_proj": 4}, "alpha_pattern": {"up_proj": 5}}
    model = adapted("moelora", tiny_llama(), **settings)
    return model, save(model, tmp_path / "ours")


def test_each_tasks_scaled_sum_of_experts_is_its_update(experts, tmp_path):
    model, ours = experts
    report = multiflora.to_lora(ours, tmp_path / "experts", per_expert=True, base=tmp_path / "base")
    assert [made.folder for made in report.adapters] == [f"expert-{e}" for e in range(4)]
    assert all(made.exact and made.rank == 2 for made in report.adapters)
    parts = [updates(report.folder(made)) for made in report.adapters]
    for task in TASKS:
        scales = report.scales[task]
        assert sum(scales) == pytest.approx(1)
        for name, update in wanted(model, task).items():
            found = sum(scale * part[name] for scale, part in zip(scales, parts, strict=True))
            torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-7)
    assert report.scales[TASKS[0]] != report.scales[TASKS[1]]
    told = json.loads((tmp_path / "experts/report.json").read_text())
    assert told["scales"] == {task: list(row) for task, row in report.scales.items()}


def test_llama_cpp_gets_a_file_for_each_expert_and_the_words_of_its_server(experts, tmp_path):
    model, ours = experts
    report = to_gguf(ours, tmp_path / "gguf", per_expert=True, base=tmp_path / "base")
    files = [f"expert-{e}.gguf" for e in range(4)]
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == [*files, "llama-server.json", "report.json"]
    told = json.loads((tmp_path / "gguf/llama-server.json").read_text())
    assert told["options"] == [word for file in files for word in ("--lora-scaled", f"{file}:0")]
    for task in TASKS:
        asked = told["lora"][task]
        assert [adapter["id"] for adapter in asked] == [0, 1, 2, 3]
        assert tuple(adapter["scale"] for adapter in asked) == report.scales[task]
        stored = [deltas(tmp_path / "gguf" / file)[1] for file in files]
        found = sum(adapter["scale"] * stored[adapter["id"]]["blk.1.ffn_up.weight"] for adapter in asked)
        update = wanted(model, task)["model.layers.1.mlp.up_proj"]
        torch.testing.assert_close(torch.from_numpy(found).double(), update, rtol=1e-5, atol=1e-7)


def test_one_file_for_each_task_has_each_by_its_number(experts, tmp_path):
    _, ours = experts
    to_gguf(ours, tmp_path / "gguf", base=tmp_path / "base")
    told = json.loads((tmp_path / "gguf/llama-server.json").read_text())
    assert told["options"] == [word for task in TASKS for word in ("--lora-scaled", f"{task}.gguf:0")]
    assert told["lora"] == {task: [{"id": number, "scale": 1.0}] for number, task in enumerate(TASKS)}


def test_a_cut_expert_is_reported_as_cut(experts, tmp_path):
    _, ours = experts
    report = multiflora.to_lora(ours, tmp_path / "cut", per_expert=True, rank=1, base=tmp_path / "base")
    assert not report.exact
    assert all(made.rank == 1 for made in report.adapters)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "moelora",
            {"shared_gate": False},
            "weighs its heads in each layer anew; .*one adapter for each task is exact",
        ),
        ("mtllora", {}, "weighs its heads in each layer anew and has a matrix for each task between A and B"),
        ("parts", {"gate": "task", "stem": "own"}, "weighs its heads in each layer anew; .*for each task is exact"),
        ("rlora", {}, "weighs its heads for each token anew.*calibration examples"),
        ("multilora", {}, "the same sum for every task: it becomes one adapter"),
        ("lora", {}, "is a LoRA adapter, which is the same sum for every task"),
        ("moelora", {"bias": "all"}, "besides its layers, which no scale of an expert would reach"),
    ],
)
def test_what_is_no_sum_of_experts_with_one_scale_each_is_refused(name, settings, words, tiny_llama, tmp_path):
    ours = save(adapted(name, tiny_llama(attention_bias=True), **settings), tmp_path / "ours")
    with pytest.raises(ExportError, match=words):
        multiflora.to_lora(ours, tmp_path / "experts", per_expert=True)
    assert not (tmp_path / "experts").exists()


def test_experts_are_of_all_tasks_and_are_not_merged(experts, tmp_path):
    _, ours = experts
    with pytest.raises(ExportError, match="task is 'sums' and per_expert is given; expected one of the two"):
        multiflora.to_lora(ours, tmp_path / "experts", per_expert=True, task="sums")
    with pytest.raises(ExportError, match="a merged model has one weight: name a task"):
        merge(ours, tmp_path / "dense", per_expert=True, base=tmp_path / "base")
