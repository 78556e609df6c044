"""Learning what is preferred: each pair as its own task, trl's loss, and each task's figures in every log line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model_state_dict
from transformers import LlamaForCausalLM

import multiflora
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError, DataError
from multiflora.estimate import estimate
from multiflora.methods import METHODS
from multiflora.recipe import Recipe, recipe_from
from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of
from multiflora.training.adapter import add_adapter
from multiflora.training.dpo import PairCollator
from multiflora.training.fit import order_examples
from tests.integration.toys import make_tokenizer, of_seed, run

TinyLlama = Callable[..., LlamaForCausalLM]
TASKS = ("low", "high")


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Two tasks with the same pairs, of which they prefer the opposite one: only who knows the task can be right."""
    for name in TASKS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, letter in (("train", "a"), ("validation", "b"), ("test", "c")):
            rows = []
            for i in range(16):
                both = [f" {i % 5}", f" {5 + i % 5}{i % 5}"]
                chosen, rejected = both if name == "low" else reversed(both)
                rows.append({"prompt": f"{letter}{i}:", "chosen": chosen, "rejected": rejected})
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"name": name, "source": str(folder / name)} for name in TASKS]


def make_recipe(folder: Path, method: Any = "lora", *, model: str = "toy", **more: Any) -> Recipe:
    train = {"learning_rate": 2e-2, "max_steps": 4, "batch_size": 8, "log_every": 1} | more.pop("train", {})
    return recipe_from(
        {
            "model": model,
            "method": method,
            "tasks": more.pop("tasks", None) or write_tasks(folder / "tasks"),
            "train": {"objective": "dpo", **train},
            "evaluate": {"limit": 4, "batch_size": 4},
            "output": str(folder / "run"),
            **more,
        }
    )


def test_each_task_learns_its_own_preference(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, log = run(tiny_llama, make_recipe(tmp_path, "mtllora", train={"max_steps": 20, "log_every": 4}))
    lines = of_seed(log)
    for task in TASKS:
        assert lines[0][f"loss/{task}"] > 0.5
        # by one preference for both tasks, one of the two would be wrong
        assert lines[-1][f"accuracy/{task}"] == 1.0
        assert lines[-1][f"loss/{task}"] < 0.2
        assert lines[-1][f"margin/{task}"] > 1.0
    assert lines[-1].keys() >= {"loss", "accuracy", "margin"}


def test_the_figures_are_those_of_trl_s_loss(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    method = {"name": "lora", "lora_dropout": 0.0}
    _, log = run(tiny_llama, make_recipe(tmp_path, method, train={"group_by_length": False}))
    lines = of_seed(log)
    assert lines[0]["loss"] == pytest.approx(math.log(2))
    assert lines[0]["margin"] == pytest.approx(0.0, abs=1e-6)
    for line in lines:
        of_tasks = [line[f"loss/{task}"] for task in TASKS if f"loss/{task}" in line]
        assert min(of_tasks) - 1e-6 <= line["loss"] <= max(of_tasks) + 1e-6
    assert lines[-1]["loss"] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("method", ["lora", {"name": "hydralora", "top_k": 2, "router_balance_loss": 0.5}])
def test_a_step_is_the_same_in_two_forward_passes(tiny_llama: TinyLlama, tmp_path: Path, method: Any) -> None:
    settings = {**({"name": method} if isinstance(method, str) else method), "lora_dropout": 0.0}
    found = []
    for size, passes in ((8, 1), (4, 2)):
        train = {"batch_size": size, "gradient_accumulation": passes, "max_steps": 2, "warmup_ratio": 0}
        model, log = run(tiny_llama, make_recipe(tmp_path / str(size), settings, train=train))
        found.append((model, of_seed(log)))
    (_, one), (_, two) = found
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.05 if "balance" in str(method) else 1e-5)
    assert two[1]["margin"] == pytest.approx(one[1]["margin"], rel=0.05)


def test_what_an_adapter_adds_to_the_loss_is_in_it_once(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    method = {"name": "hydralora", "top_k": 2, "router_balance_loss": 0.5, "lora_dropout": 0.0}
    recipe, tokenizer = make_recipe(tmp_path, method, train={"max_steps": 1}), make_tokenizer()
    _, log = run(tiny_llama, recipe)
    model = add_adapter(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1), recipe)
    pairs = order_examples(recipe, encode_tasks(recipe, tokenizer))[0].dataset
    batch = PairCollator(pad_token_id=0)(pairs.to_list())
    model.train()(**{key: batch[key] for key in ("input_ids", "attention_mask", "task_id")})
    # a fresh adapter prefers nothing: its own loss is log 2
    added = float(multiflora.auxiliary_loss(model))
    assert added > 0.4
    assert log[0]["loss"] == pytest.approx(math.log(2) + added, rel=1e-3)


def test_a_resumed_run_is_the_whole_one(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    method = {"name": "rlora", "lora_dropout": 0.1}
    train = {"max_steps": 5, "gradient_accumulation": 2, "log_every": 2}
    whole, log = run(tiny_llama, make_recipe(tmp_path / "whole", method, train=train))
    recipe = make_recipe(tmp_path / "cut", method, train=train | {"save_every": 3})
    run(tiny_llama, recipe)
    again, log_again = run(tiny_llama, recipe, checkpoint=recipe.output / "checkpoints" / "checkpoint-3")
    expected = get_peft_model_state_dict(whole)
    assert all(tensor.equal(expected[name]) for name, tensor in get_peft_model_state_dict(again).items())
    assert of_seed(log_again) == of_seed(log)  # the line of steps 3 and 4, too
    assert [path.name for path in recipe.output.rglob("ref")] == []


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lorahub", "losparse", "loraga"}))
def test_every_method_that_is_not_refused_takes_a_step(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    settings = {"num_virtual_tokens": 2} if METHODS[method].trains == "prompt" else {}
    settings |= {"tinit": 0, "tfinal": 0, "init_r": 4} if method == "adalora" else {}
    _, log = run(tiny_llama, make_recipe(tmp_path, {"name": method, **settings}, train={"max_steps": 3}))
    lines = of_seed(log)
    # with the adapter on as with it off, before the first step; but for dropout, and prompts that start at random
    differs = method in ("rlora", "mlora", "parts") or METHODS[method].trains == "prompt"
    assert lines[0]["margin"] == pytest.approx(0.0, abs=0.3 if differs else 1e-4)
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_whole_job_goes_on_from_an_adapter_and_scores_as_ever(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(tmp_path / "model")
    words: dict[str, Any] = {"model": str(tmp_path / "model")}
    # the chosen texts are what sft learns from the same files
    multiflora.train(make_recipe(tmp_path, "mtllora", train={"objective": "sft", "max_steps": 8}, **words), quiet=True)
    words |= {"init_from": str(tmp_path / "run"), "output": str(tmp_path / "second")}
    recipe = make_recipe(tmp_path, {"name": "mtllora", "lora_dropout": 0.0}, **words)
    plan = estimate(recipe)
    assert plan.objective == "dpo: 8 pairs in a step"
    assert plan.tokens_per_step > plan.loss_tokens_per_step > 8 * (2 + 3)
    done = multiflora.train(recipe, quiet=True)
    lines = of_seed(done.results["training"]["log"])
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # from the adapter, not from the base model
    assert {task["metric"] for task in done.results["adapted"]["tasks"].values()} == {"nll"}
    card = (done.output / "README.md").read_text()
    assert "The objective is dpo: of the two answers in a row" in card
    assert "4 steps of 8 pairs" in card
    assert "nats per pair" in multiflora.report(done.output).page.read_text()


def rows_of(folder: Path, *rows: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_forms_of_a_pair(tmp_path: Path) -> None:
    said = [[{"role": "assistant", "content": word}] for word in ("yes", "no")]
    asked = [{"role": "user", "content": "Is 4 even?"}]
    forms: list[dict[str, Any]] = [
        {"prompt": "Is 4 even?", "chosen": " yes", "rejected": " no"},
        {"prompt": "Is 4 even?", "completion": " yes", "rejected": " no"},
        {"prompt": asked, "chosen": said[0], "rejected": said[1]},
        {"chosen": asked + said[0], "rejected": asked + said[1]},
    ]
    for i, row in enumerate(forms):
        numbered = [json.loads(json.dumps(row).replace("4", str(k))) for k in range(20)]
        [first, *_] = examples_of(load_task(rows_of(tmp_path / str(i), *numbered)), "train")
        assert (first.completion, first.rejected) == (" yes", " no")
        assert "even?" in first.prompt


GOOD = {"prompt": "a:", "chosen": " 1", "rejected": " 2"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{**GOOD, "prompt": f"a{i}:"} for i in range(20)] + [{"prompt": "b:", "chosen": " 1"}],
            "pairs.jsonl, line 21",
        ),
        ([{**GOOD, "prompt": f"a{i}:", "rejected": None} for i in range(20)], r"pairs.jsonl, line \d+.*null"),
        (
            [{**GOOD, "prompt": f"a{i}:", "rejected": " "} for i in range(20)],
            r"line \d+: the rejected of task .* is empty",
        ),
        (
            [{**GOOD, "prompt": f"a{i}:", "rejected": "1"} for i in range(20)],
            r"train-\d+: the rejected text is the comp",
        ),
        (
            [{"prompt": f"a{i}:", "completion": " 1", **({"rejected": " 2"} if i else {})} for i in range(20)],
            r"pairs.jsonl, line 1 has no 'rejected', but .*pairs.jsonl, line 2 has",
        ),
    ],
)
def test_a_row_without_a_worse_text_is_named(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    recipe = make_recipe(tmp_path, tasks=[rows_of(tmp_path, *rows)])
    with pytest.raises(DataError, match=told):
        encode_tasks(recipe, make_tokenizer())


def test_a_task_without_pairs_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{i}:", "completion": " 1"} for i in range(20)]
    recipe = make_recipe(tmp_path, tasks=[rows_of(tmp_path, *rows)])
    with pytest.raises(ConfigError, match=r"rows of task pairs have no worse completion \(.*pairs.jsonl, line 1\)"):
        encode_tasks(recipe, make_tokenizer())
    with pytest.raises(ConfigError, match="dpo is given, but objective is 'sft', which ignores it"):
        make_recipe(tmp_path, train={"objective": "sft", "dpo": {"beta": 0.1}})
    with pytest.raises(ConfigError, match=r"train.dpo.beta is 0"):
        make_recipe(tmp_path, train={"dpo": {"beta": 0}})
