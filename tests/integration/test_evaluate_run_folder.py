"""From a run's folder alone: its scores again, by us and by the harness as the model card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import multiflora
from multiflora.artifact import write_artifact
from multiflora.errors import AdapterError, ConfigError
from multiflora.evaluation.run import evaluate
from multiflora.export.dense import merge
from multiflora.recipe import Recipe, recipe_from

COLOURS = [" blue", " red", " green"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model and its tokenizer, on disk."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["is the sky blue red green? 1 2 3 4 5 6 7 8 9 0 + ="] * 9
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>", "<pad>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.4,
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Recipe:
    sky = [
        {
            "prompt": f"is the sky{' blue' * (i % 5)} {i}?",
            "completion": COLOURS[i % 3],
            "choices": COLOURS,
            "answer": i % 3,
        }
        for i in range(30)
    ]
    sums = [{"prompt": f"1 + {i} =", "completion": f" {i + 1}", "answer": str(i + 1)} for i in range(30)]
    for name, rows in (("sky", sky), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from(
        {
            "model": {"name": str(base), "dtype": "float32"},
            "method": {"name": "rlora", "r": 4, "num_heads": 2},
            "tasks": [str(tmp_path / "sky.jsonl"), str(tmp_path / "sums.jsonl")],
            "evaluate": {"batch_size": 4, "max_new_tokens": 8, "split": "validation", "limit": 2},
            "output": str(tmp_path / "run"),
        }
    )


@pytest.fixture
def run(recipe: Recipe) -> Path:
    """A run's folder, as training leaves it."""
    return leave_run(
        recipe, multiflora.RLoraConfig(r=4, num_heads=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def leave_run(recipe: Recipe, config: peft.PeftConfig) -> Path:
    """Write what a training leaves, with an adapter whose every trainable number is random."""
    from multiflora.evaluation.load import load_base

    model, tokenizer = load_base(recipe.model)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(recipe.output)
    scores = evaluate(
        adapted, tokenizer, recipe.tasks, split="validation", batch_size=4, max_new_tokens=8, folder=recipe.output
    )
    write_artifact(recipe.output, recipe, adapted=scores)
    return recipe.output


def test_a_run_scores_the_same_from_its_folder(run: Path) -> None:
    before = json.loads((run / "results.json").read_text())["adapted"]
    found = evaluate(run)
    assert found == before
    assert [s["n"] for s in found["tasks"].values()] == [3, 3]  # all of the split, not the recipe's limit
    assert multiflora.evaluate(str(run), tasks=["sums"], limit=1)["tasks"]["sums"]["n"] == 1


def test_the_cards_own_lines_give_the_harness_the_same_scores(
    run: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (run / "README.md").read_text().split("```python\n")[-1].partition("```")[0]
    assert "simple_evaluate(" in code
    monkeypatch.chdir(run)
    (run / "base").symlink_to(base)  # the card names a base folder by its last part
    names: dict[str, Any] = {}
    exec(code, names)
    ours = json.loads((run / "results.json").read_text())["adapted"]["tasks"]
    theirs = names["found"]["results"]
    for name in ("sky", "sums"):
        assert theirs[name][f"{ours[name]['metric']},none"] == ours[name]["score"]


def test_a_merged_model_has_the_adapters_scores_in_the_harness(
    base: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "multilora", "r": 4, "num_modules": 2}
    ours = leave_run(
        recipe_from({**recipe.model_dump(), "method": method}),
        multiflora.MultiLoraConfig(r=4, num_modules=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted = json.loads((ours / "results.json").read_text())["adapted"]["tasks"]
    untrained = evaluate(str(base), tasks=recipe.tasks, split="validation", batch_size=4, max_new_tokens=8)["tasks"]
    assert any(adapted[name]["nll"] != untrained[name]["nll"] for name in adapted)  # there is something to merge
    assert merge(ours, tmp_path / "dense").exact
    monkeypatch.chdir(ours)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "dense"), "dtype": "float32", "softmax_dtype": "float32"},
        tasks=list(adapted),
        task_manager=TaskManager(include_path="harness", include_defaults=False),
        device="cpu",
        batch_size=4,
    )
    assert {name: found["results"][name][f"{scores['metric']},none"] for name, scores in adapted.items()} == {
        name: scores["score"] for name, scores in adapted.items()
    }


def test_the_cards_first_lines_load_the_adapter(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (run / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    assert code.startswith("import multiflora")
    monkeypatch.chdir(run)
    (run / "base").symlink_to(base)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].peft_config["default"].num_heads == 2


def test_a_model_without_an_adapter_is_scored_too(base: Path, recipe: Recipe) -> None:
    assert evaluate(str(base), tasks=recipe.tasks[:1], split="validation")["tasks"]["sky"]["n"] == 3


def test_what_cannot_be_loaded_is_said(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"No tokenizer could be loaded from 'no/where': there is no such folder, and as a model .*'embedded'",
    ):
        evaluate("no/where", tasks=["boolq"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"No tokenizer could be loaded from .*: the folder holds no config\.json, but "
    ):
        evaluate(tmp_path / "empty", tasks=["boolq"])
    (run / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterError, match=r"has a recipe but no adapter.*--resume"):
        evaluate(run)
    with pytest.raises(ConfigError, match=r"holds an adapter but no recipe.yaml"):
        evaluate(tmp_path, tasks=["boolq"])
