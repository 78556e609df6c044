"""ms-swift, as it is installed, trains our methods by the plug-in file of docs/integrations.md: its own command line.

`make integrations` runs this in an environment of its own; ms-swift needs an older peft than the other tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("swift", reason="ms-swift is not installed here: make integrations")

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import multiflora

assert multiflora.__version__  # imported before peft loads an adapter: it makes the methods known

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
MIXLORA = (
    "multiflora.MixLoraConfig(num_experts=4, r=4, router_balance_loss=1.0, lora_dropout=0.0, "
    'target_modules="all-linear", task_type="CAUSAL_LM")'
)
SETTINGS = {
    "model": str(MODEL),
    "model_type": "llama",
    "template": "dummy",
    "external_plugins": "plugin.py",
    "tuner_type": "multiflora",
    "remove_unused_columns": "false",
    "torch_dtype": "float32",
    "split_dataset_ratio": "0",
    "report_to": "none",
    "logging_steps": "1",
    "add_version": "false",
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "1",
    "learning_rate": "0.01",
}

Swift = Callable[..., str]


def line(prompt: str, answer: str, **more: str) -> str:
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": said} | more) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's plug-in, another one, and rows."""
    made = tmp_path_factory.mktemp("ms-swift")
    page = (Path(__file__).parents[2] / "docs/integrations.md").read_text("utf-8")
    (shown,) = re.findall(r"^```python\n(.*?tuners_map.*?)^```", page, re.DOTALL | re.MULTILINE)
    (made / "plugin.py").write_text(shown, "utf-8")
    other, count = re.subn(r"multiflora\.\w+Config\(.*?\n        \)", MIXLORA, shown, flags=re.DOTALL)
    assert count == 1
    (made / "mixlora.py").write_text(other, "utf-8")
    rows = [line(prompt, answer, task_id=task) for task, pairs in ROWS.items() for prompt, answer in pairs]
    (made / "rows.jsonl").write_text("".join(rows), "utf-8")
    (made / "one_row.jsonl").write_text(line("The lily is", " white") * 8, "utf-8")
    (made / "unknown.jsonl").write_text(line("The lily is", " white", task_id="scents") * 8, "utf-8")
    return made


@pytest.fixture(scope="module")
def swift(folder: Path) -> Swift:
    """Run ms-swift's command in the folder, and return what it wrote."""

    def run(command: str, *, fails: bool = False, **settings: Any) -> str:
        words = [word for key, value in (SETTINGS | settings).items() for word in (f"--{key}", str(value))]
        done = subprocess.run(
            [Path(sys.executable).with_name("swift"), command, *words],
            cwd=folder,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    return run


def log_lines(said: str) -> list[dict[str, Any]]:
    """The log's lines with a loss."""
    return [yaml.safe_load(found) for found in re.findall(r"\{'loss'.*?\}", said)]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def losses(model: Any, task: str, **words: Any) -> float:
    """Mean loss of the task's answers."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = []
    for prompt, answer in ROWS[task]:
        ids, own = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(ids) + own])
            found.append(model(input_ids=torch.tensor([ids + own]), labels=labels, **words).loss)
    return float(torch.stack(found).mean())


@pytest.fixture(scope="module")
def by_task(folder: Path, swift: Swift) -> list[dict[str, Any]]:
    """The log of a training by the page's plug-in, gated by task."""
    return log_lines(swift("sft", dataset="rows.jsonl", output_dir="by_task", num_train_epochs=12))


def test_each_task_learns_its_own_and_plain_peft_loads_what_was_saved(
    by_task: list[dict[str, Any]], folder: Path
) -> None:
    assert float(by_task[-1]["loss"]) < 0.2 * float(by_task[0]["loss"])
    model = PeftModel.from_pretrained(base(), folder / "by_task/checkpoint-24").eval()
    assert model.active_peft_config.task_names == list(ROWS)
    for task, other in zip(ROWS, reversed(ROWS), strict=True):
        own = losses(model, task, task_id=[task])
        assert own < 0.3 * losses(base(), task)
        assert own < 0.6 * losses(model, task, task_id=[other])


def test_a_training_goes_on_from_a_saved_adapter(by_task: list[dict[str, Any]], folder: Path, swift: Swift) -> None:
    settings = {"dataset": "rows.jsonl", "adapters": "by_task/checkpoint-24", "load_args": "false", "max_steps": 1}
    (first,) = log_lines(swift("sft", output_dir="further", **settings))
    assert float(first["loss"]) < 0.3 * float(by_task[0]["loss"])


def test_a_balance_loss_counts_once(folder: Path, swift: Swift) -> None:
    """In the loss and in its gradient, over two accumulated batches of equal rows, checkpointed as ms-swift does."""
    settings = {"learning_rate": 1e-12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    said = swift(
        "sft", external_plugins="mixlora.py", dataset="one_row.jsonl", output_dir="balance", max_steps=1, **settings
    )
    (seen,) = log_lines(said)
    model = PeftModel.from_pretrained(base(), folder / "balance/checkpoint-1", is_trainable=True).train()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt, answer = tokenizer("The lily is")["input_ids"], tokenizer(" white")["input_ids"]
    ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]] * 4)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    plain = model.eval()(input_ids=ids, labels=labels).loss
    assert out.loss.item() - plain.item() > 0.5
    assert float(seen["loss"]) == pytest.approx(out.loss.item(), rel=1e-3)
    assert float(seen["grad_norm"]) == pytest.approx(float(norm), rel=1e-3)


def test_a_task_that_the_adapter_does_not_know_is_refused(swift: Swift) -> None:
    said = swift("sft", fails=True, dataset="unknown.jsonl", output_dir="unknown", max_steps=1)
    assert "The adapter has no task 'scents'; its tasks are colours, seasons." in said
