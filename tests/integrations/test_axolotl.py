"""Axolotl, as it is installed, trains our methods: its own command line, its own data, packing, merge and inference.

`make integrations` runs this in an environment of its own; axolotl's versions are not those of the other tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # tests use no network, and axolotl would report each command
pytest.importorskip("axolotl", reason="axolotl is not installed here: make integrations")

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening

import multiflora
from multiflora.errors import ConfigError, DataError
from multiflora.integrations.axolotl import MultifloraPlugin
from multiflora.integrations.axolotl.rows import TASK, TaskCollator

SHARED = Path(os.environ.get("MULTIFLORA_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "models/tinylm-1m"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"needs the model in {SHARED}")

ANSWERS = {
    "colours": ("Which colour has", {"rose": "red", "violet": "blue", "lily": "white", "daffodil": "yellow"}),
    "seasons": (
        "In which season blooms",
        {"rose": "summer", "violet": "spring", "lily": "autumn", "daffodil": "winter"},
    ),
}
ROWS = {
    task: [
        (f"{question} the {flower} of {place}?", f" {answer}") for flower, answer in answers.items() for place in "AB"
    ]
    for task, (question, answers) in ANSWERS.items()
}
KIND = {"field_instruction": "prompt", "field_output": "completion"} | dict.fromkeys(
    ("format", "no_input_format"), "{instruction}"
)

SECTION = {"method": {"name": "rlora", "num_heads": 2}}
GATED = {"method": "moelora"}

Axolotl = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two data sets."""
    made = tmp_path_factory.mktemp("axolotl")
    for task, rows in ROWS.items():
        lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows)
        (made / f"{task}.jsonl").write_text("\n".join(lines), "utf-8")
    (made / "one_row.jsonl").write_text("\n".join([json.dumps({"prompt": "The lily is", "completion": " white"})] * 8))
    return made


@pytest.fixture(scope="module")
def axolotl(folder: Path) -> Axolotl:
    """Run axolotl's command in the folder, and return what it wrote."""
    command = Path(sys.executable).with_name("axolotl")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

    def run(*words: str, text: str = "") -> str:
        done = subprocess.run(
            [command, *words], cwd=folder, env=env, input=text, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    return run


def config(folder: Path, name: str, method: dict[str, Any], tasks: tuple[str, ...] = tuple(ROWS), **more: Any) -> str:
    """Write a config that trains ``method`` into the folder of that name, and return its file."""
    section = {"method": method} | more.pop("section", {})
    settings = {
        "base_model": str(MODEL),
        "adapter": "multiflora",
        "multiflora": section,
        "datasets": [{"path": f"./{task}.jsonl", "type": KIND} for task in tasks],
        "output_dir": f"./{name}",
        "dataset_prepared_path": f"./prepared-{name}",
        "special_tokens": {"pad_token": "<|pad|>"},
        "sequence_len": 128,
        "attn_implementation": "sdpa",
        "pad_to_sequence_len": False,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "bf16": False,
        "tf32": False,
        "seed": 1,
        "dataset_num_proc": 1,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | more), "utf-8")
    return f"{name}.yaml"


def train(axolotl: Axolotl, file: str) -> list[dict[str, float]]:
    """Train by axolotl's command, and return its log lines with a loss."""
    lines = (line.strip() for line in axolotl("train", file, "--launcher", "python").replace("\r", "\n").split("\n"))
    found = (yaml.safe_load(line[line.index("{'loss'") :]) for line in lines if "{'loss'" in line)
    return [{key: float(value) for key, value in line.items()} for line in found]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def losses(model: Any, task: str, **words: Any) -> float:
    """Mean loss of the task's completions."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = []
    for prompt, completion in ROWS[task]:
        ids, own = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(ids) + own])
            found.append(model(input_ids=torch.tensor([ids + own]), labels=labels, **words).loss)
    return float(torch.stack(found).mean())


@pytest.fixture(scope="module")
def by_task(folder: Path, axolotl: Axolotl) -> list[dict[str, float]]:
    """The log of the training that docs/integrations.md shows: packed, gated by task, and scored meanwhile."""
    page = (Path(__file__).parents[2] / "docs/integrations.md").read_text("utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    more = yaml.safe_load(shown) | {"eval_sample_packing": False, "micro_batch_size": 1, "num_epochs": 16}
    return train(axolotl, config(folder, "by_task", {}, **more, val_set_size=2, evals_per_epoch=1))


def test_a_packed_training_logs_and_lowers_each_tasks_loss(by_task: list[dict[str, float]]) -> None:
    for task in ROWS:
        seen = [line[f"loss/{task}"] for line in by_task if f"loss/{task}" in line]
        assert seen[-1] < 0.7 * seen[0]


def test_plain_peft_loads_what_axolotl_saved_and_each_task_has_learned_its_own(
    by_task: list[dict[str, float]], folder: Path
) -> None:
    model = PeftModel.from_pretrained(base(), folder / "by_task").eval()
    assert model.active_peft_config.task_names == list(ROWS)
    for task, other in zip(ROWS, reversed(ROWS), strict=True):
        own = losses(model, task, task_id=[task])
        assert own < 0.4 * losses(base(), task)
        assert own < 0.6 * losses(model, task, task_id=[other])


def test_inference_answers_for_the_task_of_the_section(
    by_task: list[dict[str, float]], folder: Path, axolotl: Axolotl
) -> None:
    method = {"name": "mtllora", "num_heads": 2, "r": 4}
    file = config(folder, "answers", method, section={"task": "colours"})
    said = axolotl(
        "inference", file, "--lora-model-dir", "./by_task", "--launcher", "python", text=ROWS["colours"][0][0]
    )
    answer = said[said.index("Give me an instruction") :]
    assert any(colour in answer for colour in ANSWERS["colours"][1].values())


def test_merge_lora_writes_the_model_with_its_adapter_in_it(folder: Path, axolotl: Axolotl) -> None:
    file = config(folder, "merges", {"name": "multilora", "num_modules": 2, "r": 4}, max_steps=2)
    assert len(train(axolotl, file)) == 2
    axolotl("merge-lora", file)
    same(folder / "merges/merged", PeftModel.from_pretrained(base(), folder / "merges").eval())


def same(merged: Path, adapted: Any) -> None:
    """Check that a merged model answers as the adapted one does, and not as the base model."""
    ids = torch.arange(1, 17)[None]
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(found, adapted(ids).logits, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, base()(ids).logits, atol=1e-1)


def test_merge_lora_merges_the_task_of_the_section(
    by_task: list[dict[str, float]], folder: Path, axolotl: Axolotl
) -> None:
    file = config(folder, "seasons", {"name": "mtllora", "num_heads": 2, "r": 4}, section={"task": "seasons"})
    axolotl("merge-lora", file, "--lora-model-dir", "./by_task")
    adapted = PeftModel.from_pretrained(base(), folder / "by_task").eval()
    same(folder / "seasons/merged", partial(adapted, task_id=["seasons"]))


def test_a_trained_adapter_of_another_method_is_refused(by_task: list[dict[str, float]], folder: Path) -> None:
    given = {"adapter": "multiflora", "multiflora": SECTION, "lora_model_dir": str(folder / "by_task")}
    with pytest.raises(ConfigError, match=r"holds a mtllora adapter, but multiflora\.method is rlora"):
        MultifloraPlugin().load_adapter(base(), DictDefault(given))


def test_rows_that_were_prepared_without_the_names_of_their_tasks_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    given = load_cfg(config(folder, "no_names", SECTION["method"]))
    load_datasets(cfg=given)
    with pytest.raises(ConfigError, match="prepared-no_names were prepared for another adapter"):
        MultifloraPlugin().load_datasets(given)


def test_a_balance_loss_counts_once(folder: Path, axolotl: Axolotl) -> None:
    """In the loss and in its gradient, over two accumulated batches of equal rows."""
    method = {"name": "mixlora", "num_experts": 4, "r": 4, "router_balance_loss": 1.0, "lora_dropout": 0.0}
    file = config(
        folder,
        "balance",
        method,
        ("one_row",),
        max_steps=1,
        learning_rate=1e-12,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1e9,
    )
    (line,) = train(axolotl, file)
    model = PeftModel.from_pretrained(base(), folder / "balance", is_trainable=True).train()
    rows = AutoTokenizer.from_pretrained(MODEL)
    prompt, completion = rows("The lily is")["input_ids"], rows(" white")["input_ids"]
    ids = torch.tensor([prompt + completion + [rows.eos_token_id]] * 4)
    out = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100))
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.eval()
    plain = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)).loss
    assert out.loss.item() - plain.item() > 0.5
    assert line["loss"] == pytest.approx(out.loss.item(), rel=1e-3)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


# ---- what reaches the model -----------------------------------------------------------------------------------------


def row(task: str, length: int) -> dict[str, Any]:
    positions = [*range(length)]
    return {
        "input_ids": [5] * length,
        "labels": [5] * length,
        "attention_mask": [1] * length,
        "position_ids": positions,
    } | {TASK: task}


def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(MODEL)
    found.pad_token = "<|pad|>"
    return found


def test_every_packed_token_has_its_task_and_fill_is_told_from_text() -> None:
    collate = TaskCollator(V2BatchSamplerDataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=8), ["a", "b"])
    batch = collate([[row("b", 2), row("a", 3)], [row("a", 8)]])
    assert batch["task_id"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert batch["real_tokens"].tolist() == [[1] * 5 + [0] * 3, [1] * 8]
    assert TASK not in batch


@pytest.mark.parametrize(("side", "second"), [("right", [1, 1, 0, 0]), ("left", [0, 0, 1, 1])])
def test_padded_rows_have_their_task_on_either_side(side: str, second: list[int]) -> None:
    made = tokenizer()
    made.padding_side = side
    batch = TaskCollator(DataCollatorForSeq2Seq(made), ["a", "b"])([row("a", 4), row("b", 2)])
    assert batch["task_id"].tolist() == [[0] * 4, [1] * 4]
    assert batch["real_tokens"].tolist() == [[1] * 4, second]


def test_flattened_rows_are_one_row_of_several_tasks() -> None:
    batch = TaskCollator(DataCollatorWithFlattening(), ["a", "b"])([row("a", 2), row("b", 3)])
    assert batch["task_id"].tolist() == [[0, 0, 1, 1, 1]]


def test_a_row_of_no_known_task_is_refused() -> None:
    with pytest.raises(DataError, match=r"of the task 'c', and the adapter's tasks are a, b"):
        TaskCollator(DataCollatorForSeq2Seq(tokenizer()), ["a", "b"])([row("c", 2)])


# ---- configs -------------------------------------------------------------------------------------------------------


def test_axolotl_finds_the_plugin_by_itself() -> None:
    manager = PluginManager.get_instance()
    assert any(isinstance(plugin, MultifloraPlugin) for plugin in manager.plugins.values())
    assert manager.supports_adapter("multiflora")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"multiflora": None}, "multiflora is missing"),
        ({"multiflora": "rlora"}, "'rlora'; expected a mapping"),
        ({"multiflora": {"method": "rlorra"}}, r"'rlorra' is not a method; .*rlora"),
        ({"multiflora": {"method": {"name": "rlora", "heads": 2}}}, "method.heads is not a setting of rlora"),
        ({"multiflora": SECTION | {"tasks": 1}}, "tasks is not a known key"),
        ({"multiflora": {"method": "dora"}}, "dora, which is no method of multiflora's own"),
        ({"adapter": "lora"}, "multiflora is given, but adapter is 'lora'"),
        ({"lora_r": 8}, "lora_r is given, and adapter: multiflora would not read it"),
        ({"peft_use_dora": True}, "peft_use_dora is given"),
        ({"load_in_4bit": True}, "load_in_4bit does not go with adapter: multiflora"),
        ({"rl": "dpo"}, "rl does not go with"),
        ({"merge_method": "memory_efficient"}, "merge_method is 'memory_efficient'"),
        ({"inference": True}, "lora_model_dir is missing"),
        ({"merge_lora": True}, r"rlora, whose update is no single matrix: \(token router\)"),
        ({"merge_lora": True, "multiflora": GATED}, "multiflora.task is missing; moelora is another adapter"),
        ({"datasets": [{"path": "a/train"}, {"path": "b/train"}]}, r"datasets.1 \(b/train\) and datasets.0 .* 'train'"),
        (
            {"sample_packing": True, "multiflora": {"method": {"name": "loramoe", "balance_weight": 0.1}}},
            "sample_packing is true and multiflora.method.balance_weight is 0.1",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_loaded(settings: dict[str, Any], words: str) -> None:
    given = {"adapter": "multiflora", "multiflora": SECTION, "datasets": [{"path": "a"}, {"path": "b"}]} | settings
    with pytest.raises(ConfigError, match=words):
        MultifloraPlugin().register(DictDefault(given))


def test_data_sets_that_are_none_are_left_to_axolotl_to_refuse() -> None:
    MultifloraPlugin().register(DictDefault({"adapter": "multiflora", "multiflora": SECTION, "datasets": ["a", 1]}))


def test_other_adapters_are_left_alone() -> None:
    given = DictDefault({"adapter": "lora", "lora_r": 8, "datasets": [{"path": "a"}]})
    before = given.to_dict()
    plugin = MultifloraPlugin()
    plugin.register(given)
    assert given.to_dict() == before
    assert plugin.load_datasets(given) is None
    assert plugin.load_adapter(None, given) is None
    assert plugin.get_trainer_cls(given) is None


def test_data_sets_of_one_given_name_are_one_task() -> None:
    data = [{"path": "a/train", "name": "one"}, {"path": "b/train", "name": "one"}, {"path": "two"}]
    given = DictDefault({"adapter": "multiflora", "multiflora": SECTION, "datasets": data})
    _, found = MultifloraPlugin().load_adapter(None, given, config_only=True)
    assert (type(found), found.task_names) == (multiflora.RLoraConfig, ["one", "two"])
