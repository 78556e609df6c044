"""Learning from the model's own answers: rewards by the tasks' scorers, each row as its own task, and a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaForCausalLM

import multiflora
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError
from multiflora.estimate import estimate
from multiflora.methods import METHODS
from multiflora.recipe import Recipe, recipe_from
from multiflora.training import shared_prompts
from multiflora.training.adapter import add_adapter
from multiflora.training.reference import Reference
from tests.integration.toys import make_tokenizer, of_seed, run

TinyLlama = Callable[..., LlamaForCausalLM]
ANSWERS = {"seven": 7, "eight": 8}


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Two tasks with the same prompts and different answers: only who knows the task can be right."""
    for name, answer in ANSWERS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, letter in (("train", "a"), ("validation", "b"), ("test", "c")):
            rows = [{"prompt": f"{letter}{i}:", "completion": f" {answer}", "answer": answer} for i in range(16)]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"name": name, "source": str(folder / name)} for name in ANSWERS]


def make_recipe(
    folder: Path, method: Any = "lora", *, grpo: dict[str, Any] | None = None, model: str = "toy", **more: Any
) -> Recipe:
    train = {"learning_rate": 2e-2, "max_steps": 4, "batch_size": 16, "log_every": 1} | more.pop("train", {})
    own = {"num_generations": 4, "max_completion_length": 2} | (grpo or {})
    return recipe_from(
        {
            "model": model,
            "method": method,
            "tasks": write_tasks(folder / "tasks"),
            "train": {"objective": "grpo", "grpo": own, **train},
            "evaluate": {"limit": 4, "batch_size": 4, "max_new_tokens": 4},
            "output": str(folder / "run"),
            **more,
        }
    )


@pytest.mark.parametrize("method", [{"name": "moelora", "r": 8}, "mtllora"])
def test_each_task_learns_its_own_answer_by_its_own_score(tiny_llama: TinyLlama, tmp_path: Path, method: Any) -> None:
    train = {"max_steps": 60, "batch_size": 64, "log_every": 5, "learning_rate": 1e-2}
    recipe = make_recipe(tmp_path, method, train=train, grpo={"num_generations": 16})
    _, log = run(tiny_llama, recipe)
    lines = of_seed(log)
    for task in ANSWERS:
        assert lines[0][f"reward/{task}"] < 0.4
        # by one answer to both tasks the two would have 1 together
        assert lines[-1][f"reward/{task}"] > 0.8
    for line in lines:
        of_tasks = [line[f"reward/{task}"] for task in ANSWERS]
        assert min(of_tasks) <= line["reward"] <= max(of_tasks)
        for kind in ("length", "cut", "equal"):
            assert line.keys() >= {kind, f"{kind}/seven", f"{kind}/eight"}
        assert 1 <= line["length"] <= 2
        assert "kl" not in line


@pytest.mark.parametrize("method", ["lora", "rlora", "moelora"])
def test_the_divergence_from_the_base_model_is_zero_at_first_and_then_grows(
    tiny_llama: TinyLlama, tmp_path: Path, method: str
) -> None:
    settings = {"name": method, "lora_dropout": 0.0} | ({"head_dropout": 0.0} if method == "rlora" else {})
    train = {"max_steps": 8, "batch_size": 64, "warmup_ratio": 0}
    _, log = run(tiny_llama, make_recipe(tmp_path, settings, grpo={"beta": 0.05}, train=train))
    lines = of_seed(log)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert all(lines[-1][f"kl/{task}"] > 1e-4 for task in ANSWERS)


@pytest.mark.parametrize("method", ["lora", "pissa", "full", "deltalora", "mtllora"])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_the_reference_stays_as_the_run_started(
    tiny_llama: TinyLlama, tmp_path: Path, method: str, is_fresh: bool
) -> None:
    recipe = make_recipe(tmp_path, method)
    model = add_adapter(tiny_llama(vocab_size=len(make_tokenizer())), recipe).eval()
    ids = torch.arange(2, 12)[None]

    def logits(of: Any) -> Tensor:
        with torch.no_grad(), multiflora.task(model, 0):
            found: Tensor = of(input_ids=ids).logits
        return found

    def move() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)

    torch.manual_seed(0)
    if not is_fresh:
        move()
    reference, before = Reference(model, is_fresh=is_fresh), logits(model)
    torch.testing.assert_close(logits(reference), before, atol=1e-5, rtol=1e-5)
    move()
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(logits(reference), before, atol=1e-5, rtol=1e-5)
    assert logits(model).equal(after)  # everything is back in its place


def test_a_resumed_run_is_the_whole_one(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    method = {"name": "rlora", "lora_dropout": 0.1}
    words: dict[str, Any] = {"grpo": {"beta": 0.02}}
    train = {"max_steps": 5, "batch_size": 8, "gradient_accumulation": 2, "log_every": 2}
    whole, log = run(tiny_llama, make_recipe(tmp_path / "whole", method, train=train, **words))
    recipe = make_recipe(tmp_path / "cut", method, train=train | {"save_every": 3}, **words)
    run(tiny_llama, recipe)
    again, log_again = run(tiny_llama, recipe, checkpoint=recipe.output / "checkpoints" / "checkpoint-3")
    expected = get_peft_model_state_dict(whole)
    assert all(tensor.equal(expected[name]) for name, tensor in get_peft_model_state_dict(again).items())
    assert of_seed(log_again) == of_seed(log)  # the line of steps 3 and 4, too
    assert [path.name for path in recipe.output.rglob("ref")] == []


@pytest.mark.parametrize("method", ["lora", "rlora", "mtllora", {"name": "mixlora", "router_balance_loss": 0.01}])
def test_a_prompt_that_is_read_once_is_the_same_to_the_model(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    settings = {"lora_dropout": 0.0} | ({"name": method} if isinstance(method, str) else method)
    settings |= {"head_dropout": 0.0} if method == "rlora" else {}
    train = {"max_steps": 3, "batch_size": 32, "gradient_accumulation": 2, "warmup_ratio": 0}
    found, lengths, scored = [], [], []
    read, by_length = shared_prompts.read, shared_prompts.by_length

    def noted(*args: Any) -> Any:
        prompts = read(*args)
        lengths[-1] += 0 if prompts is None else len(prompts.lengths)
        # in a micro-batch as in a step's whole batch: a group's answers are not dealt out singly
        assert prompts is None or 4 * len(prompts.which.unique()) <= len(prompts.which)
        return prompts

    def counted(lengths: Tensor) -> Any:
        scored.append(len(lengths))
        return by_length(lengths)

    monkeypatch.setattr(shared_prompts, "read", noted)
    monkeypatch.setattr(shared_prompts, "by_length", counted)
    monkeypatch.setattr(shared_prompts, "SAVED", 4)  # toy answers have two tokens at most: groups of them, too
    for may in (shared_prompts.may_share, lambda model: False):
        monkeypatch.setattr(shared_prompts, "may_share", may)
        lengths.append(0)
        recipe = make_recipe(tmp_path / str(len(found)), settings, grpo={"beta": 0.05}, train=train)
        model, log = run(tiny_llama, recipe)
        found.append((get_peft_model_state_dict(model), of_seed(log)))
    # 3 steps of 64 answers: written, scored by the reference, learned from; a balance loss needs prompts in their rows
    assert lengths == [3 * 64 * 3 if isinstance(method, str) else 0, 0]
    assert sum(scored) < 3 * 64 * 2  # answers that say the same to one prompt are scored once
    (ours, our_log), (whole, whole_log) = found
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-4, rtol=1e-3)
    for line, other in zip(our_log, whole_log, strict=True):
        same = {key: value for key, value in other.items() if not key.startswith("routing/")}  # of the tokens read
        assert {key: line[key] for key in same} == pytest.approx(same, abs=1e-4)


def test_a_function_of_the_recipe_rewards_in_the_place_of_the_score(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def half(example, text):\n    assert example.answer == '8' and example.prompt[0] == 'a'\n    return 0.5\n"
        "def nothing(example, text):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, log = run(tiny_llama, make_recipe(tmp_path, grpo={"rewards": {"eight": "my_rewards:half"}}))
    assert [line["reward/eight"] for line in of_seed(log)] == [0.5] * 4
    assert of_seed(log)[0]["equal/eight"] == 1.0
    for entry, told in (
        ("my_rewards:nothing", r"gave nan for a text to the row eight-train-\d+; expected a finite number"),
        ("my_rewards:haf", r"my_rewards has no function haf; did you mean half"),
        ("no_such_module:half", r"cannot import no_such_module"),
    ):
        with pytest.raises(ConfigError, match=told):
            run(tiny_llama, make_recipe(tmp_path, grpo={"rewards": {"eight": entry}}))
    # before anything is loaded: there is no such model
    with pytest.raises(ConfigError, match="cannot import no_such_module"):
        multiflora.train(make_recipe(tmp_path, model="absent", grpo={"rewards": {"eight": entry}}), quiet=True)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lorahub", "losparse", "loraga"}))
def test_every_method_that_is_not_refused_takes_a_step(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    settings = {"prefix": {"num_virtual_tokens": 2}, "prompt": {"num_virtual_tokens": 2}}.get(method, {})
    settings |= {"num_virtual_tokens": 2} if method == "ptuning" else {}
    settings |= {"tinit": 0, "tfinal": 0, "init_r": 4} if method == "adalora" else {}
    recipe = make_recipe(tmp_path, {"name": method, **settings}, grpo={"beta": 0.1}, train={"max_steps": 2})
    _, log = run(tiny_llama, recipe)
    assert all(math.isfinite(line["kl"]) and math.isfinite(line["loss"]) for line in of_seed(log))


def test_the_whole_job_goes_on_from_an_adapter_and_says_what_it_did(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(tmp_path / "model")
    words: dict[str, Any] = {"model": str(tmp_path / "model")}
    first = make_recipe(tmp_path, "mtllora", **words).model_dump(mode="json", exclude_none=True)
    first["train"] |= {"objective": "sft", "max_steps": 10}
    del first["train"]["grpo"]
    multiflora.train(first, quiet=True)
    words |= {"init_from": str(tmp_path / "run"), "output": str(tmp_path / "second"), "grpo": {"beta": 0.1}}
    recipe = make_recipe(tmp_path, "mtllora", train={"learning_rate": 1e-12}, **words)
    plan = estimate(recipe)
    assert plan.objective == "grpo: 16 answers in a step, 4 to each of 4 prompts, each of at most 2 tokens"
    assert plan.loss_tokens_per_step == 32
    assert plan.tokens_per_step > 32
    done = multiflora.train(recipe, quiet=True)
    lines = [line for line in done.results["training"]["log"] if "reward" in line]
    # from the adapter, not from the base model; dropout is on in the loss and off in the reference
    assert lines[0]["kl"] < 0.2
    assert lines[0]["reward/seven"] > 0.3
    assert {task["score"] for task in done.results["adapted"]["tasks"].values()} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    card = (done.output / "README.md").read_text()
    assert "The objective is grpo: of several answers that the model itself writes" in card
    assert "4 steps of 16 answers (4 to each prompt, 2 tokens)" in card
    assert "num_generations: 4" in (done.output / "recipe.yaml").read_text()
    assert "Training reward by task" in multiflora.report(done.output).page.read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"grpo": {"num_generations": 5}}, r"num_generations is 5, but a step has batch_size x .* = 16 answers"),
        ({"grpo": {"num_generation": 4}}, r"grpo.num_generation is not a known key; did you mean num_generations"),
        ({"grpo": {"rewards": {"seven": "os.system"}}}, r"the reward of seven is .*expected module:function"),
        ({"grpo": {"rewards": {"sevn": "a:b"}}}, r"rewards names 'sevn', no task of this recipe; did you mean seven"),
        ({"train": {"objective": "sft"}}, r"grpo is given, but objective is 'sft', which ignores it"),
        ({"train": {"objective": "grop"}}, r"train.objective is 'grop'; did you mean grpo"),
        ({"train": {"packing": True}}, r"packing is true, but objective is 'grpo'"),
        ({"train": {"loss": "tasks"}}, r"loss is tasks, but objective is 'grpo'"),
        ({"method": "lorahub"}, r"objective is 'grpo', but lorahub weighs LoRAs by their loss"),
        ({"method": "losparse"}, r"objective is 'grpo', but losparse takes rows away"),
        ({"method": "loraga"}, r"objective is 'grpo', but loraga takes its start from the gradient"),
        ({"method": {"name": "lora", "target_modules": ["lm_head"]}}, r"names the output layer .*Leave the output"),
        ({"grpo": {"max_completion_length": 64}}, r"max_completion_length is 64, but the model reads 64 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(
    tiny_llama: TinyLlama, tmp_path: Path, words: dict[str, Any], told: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    for does in (estimate, lambda recipe: multiflora.train(recipe, quiet=True)):
        with pytest.raises(ConfigError, match=told):
            does(make_recipe(tmp_path, **{"method": "lora", "model": str(tmp_path / "model"), **words}))
    assert not (tmp_path / "run").exists()


def test_a_task_without_a_score_for_a_text_is_refused(tmp_path: Path) -> None:
    plain = make_recipe(tmp_path).model_dump(mode="json", exclude_none=True)
    plain["tasks"][0] |= {"score": "nll", "answer": None, "stop": []}
    with pytest.raises(ConfigError, match=r"task seven has score 'nll', which says of no single text whether"):
        encode_tasks(recipe_from(plain), make_tokenizer())
    plain["train"]["grpo"]["rewards"] = {"seven": "some:function"}
    assert len(encode_tasks(recipe_from(plain), make_tokenizer()).store) == 32


def test_answers_are_written_without_dropout_by_prepared_branches(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    generate = LlamaForCausalLM.generate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = generate(self, *args, **kwargs)
        layer = self.model.layers[0].self_attn.q_proj
        seen.append((self.training, layer.training, len(layer._prepared)))
        return made

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    run(tiny_llama, make_recipe(tmp_path, {"name": "rlora", "lora_dropout": 0.5}, train={"max_steps": 2}))
    assert seen == [(False, False, 1)] * 2
