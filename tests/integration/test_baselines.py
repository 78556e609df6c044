"""The contract of every method that is no class of ours: trained, saved, loaded on the pristine base, scored, resumed.

These are peft's methods, full fine-tuning, LoraHub and LoSparse; a method joins by being in ``METHODS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_scheduler

import multiflora
from multiflora.data.collate import Collator
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError
from multiflora.evaluation.load import load_target
from multiflora.evaluation.prompted import generate_behind_prompt
from multiflora.methods import METHODS
from multiflora.recipe import Recipe, load_recipe
from multiflora.training.adapter import add_adapter, save_adapter, start_of
from multiflora.training.fit import fit, order_examples
from multiflora.training.output import CHECKPOINTS
from tests.integration.toys import make_recipe, make_tokenizer

TinyLlama = Callable[..., LlamaForCausalLM]

BASELINES = [name for name, card in METHODS.items() if card.module is None]
# what a script with peft and torch alone can be asked for
PEFT_S = [name for name in BASELINES if name not in ("lorahub", "losparse")]
# LoraHub refuses to go on from within: tests/integration/test_whole_field.py
RESUMED = [name for name in BASELINES if name != "lorahub"]
# rates at which ten steps of a tiny model show; the paper's schedule for AdaLoRA needs more than a few steps
TRAIN: dict[str, Any] = {"max_steps": 10, "batch_size": 8, "log_every": 1}
RATES = {"full": 3e-3, "prompt": 0.1, "prefix": 0.1, "ia3": 0.05, "ptuning": 2e-2, "loraplus": 5e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"tinit": 2, "tfinal": 3, "init_r": 4, "lora_alpha": 16},
    "losparse": {"low_rank": 0.2, "keep": 0.2, "every": 2},
    "lorahub": {"budget": 6},
}
STEPS = 6
IDS = torch.tensor([[5, 9, 11, 3, 7, 22, 8], [39, 2, 17, 30, 6, 12, 19]])


@pytest.fixture
def model_folder(tiny_llama: TinyLlama, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    tokenizer = make_tokenizer()
    # fewer keys than queries, and a head that is the embedding: where prefixes and dense saving have gone wrong before
    words = {"num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2, "eos_token_id": 1}
    tiny_llama(vocab_size=len(tokenizer), **words).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_for(folder: Path, name: str, model: str, **train: Any) -> Recipe:
    method = {"name": name, **SETTINGS.get(name, {})}
    rate = RATES.get(name, 2e-2)
    return make_recipe(folder, method, model=model, **{**TRAIN, "learning_rate": rate, **train})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of two rows, behind whatever a learned prompt puts before them."""
    return model.eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_is_learned_saved_loaded_and_scored(name: str, model_folder: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in Path(model_folder).iterdir()}
    recipe = recipe_for(tmp_path, name, model_folder)
    result = multiflora.train(recipe, quiet=True)
    log = [line["loss"] for line in result.log if "loss" in line]
    assert log[-1] < log[0]
    assert 0 < result.results["parameters"]["trainable"] <= result.results["parameters"]["total"]
    assert {path.name: path.read_bytes() for path in Path(model_folder).iterdir()} == before
    # a fresh load, as another process would make it, gives the scores that the run has written down
    again = multiflora.evaluate(str(result.output), limit=4, progress=False)
    assert again == result.results["adapted"]
    assert again != result.results["base"]
    assert load_recipe(result.output / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", BASELINES)
def test_what_was_saved_is_what_was_trained(
    name: str, tiny_llama: TinyLlama, model_folder: str, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, name, model_folder, bf16=False)
    tokenizer = make_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    untouched = logits(base)
    model = add_adapter(base, recipe)
    start = start_of(model)
    fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True)
    trained = logits(model)

    save_adapter(model, recipe.output, start=start)
    tokenizer.save_pretrained(recipe.output)
    (recipe.output / "recipe.yaml").write_text(recipe.to_yaml(recipe.output))
    loaded = load_target(recipe.output).model
    assert not torch.allclose(trained, untouched, atol=1e-2)
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=2e-5)
    if isinstance(loaded, PeftModel):
        with loaded.disable_adapter():
            assert torch.equal(loaded(input_ids=IDS).logits, untouched)
        # and without us: peft alone loads it
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(recipe.output))
        assert torch.equal(logits(stock), logits(loaded))
    else:
        assert torch.equal(logits(loaded), trained)


def plain_loop(recipe: Recipe, model_folder: str) -> tuple[Any, list[float]]:
    """The same training with peft and torch alone: no trainer, and losses that the model computes from labels."""
    tokenizer, train = make_tokenizer(), recipe.train
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(recipe.seed)
    model = plain_model(recipe, base)
    data, steps = order_examples(recipe, encode_tasks(recipe, tokenizer))
    collate = Collator(pad_token_id=0, packing=False, max_length=train.max_length)
    weights = [p for p in model.parameters() if p.requires_grad]
    words = {"betas": (0.9, 0.999), "eps": 1e-8}
    if recipe.method.name == "loraplus":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=train.learning_rate, loraplus_lr_ratio=16, **words
        )
    else:
        optimizer = torch.optim.AdamW(weights, lr=train.learning_rate, weight_decay=0.0, **words)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)
    history = []
    model.train()
    for step in range(steps):
        rows = [data.dataset[i] for i in range(step * train.batch_size, (step + 1) * train.batch_size)]
        batch = {k: v for k, v in collate(rows).items() if k in ("input_ids", "attention_mask", "labels")}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        if recipe.method.name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        history.append(float(loss))
    return model, history


def plain_model(recipe: Recipe, base: Any) -> Any:
    """The adapter as a script with peft would make it."""
    pair = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    tokens = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**pair),
        "loraplus": lambda: peft.LoraConfig(**pair),
        "rslora": lambda: peft.LoraConfig(**pair, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**pair, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**pair, init_lora_weights="pissa"),
        "adalora": lambda: peft.AdaLoraConfig(
            **pair, init_r=4, target_r=2, tinit=2, tfinal=3, lora_alpha=16, total_step=STEPS
        ),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(**tokens, prompt_tuning_init="SAMPLE_VOCAB"),
        "prefix": lambda: peft.PrefixTuningConfig(**tokens),
        "ptuning": lambda: peft.PromptEncoderConfig(**tokens, encoder_hidden_size=128),
    }
    return (
        base.requires_grad_(True)
        if recipe.method.name == "full"
        else get_peft_model(base, configs[recipe.method.name]())
    )


@pytest.mark.parametrize("name", PEFT_S)
def test_peft_s_own_numbers_are_reproduced(name: str, model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, name, model_folder, max_steps=STEPS, bf16=False)
    tokenizer = make_tokenizer()
    model = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), recipe)
    _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True)
    plain, history = plain_loop(recipe, model_folder)
    ours = [line["loss"] for line in log if "loss" in line]
    assert ours == pytest.approx(history, rel=2e-5)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_one_that_never_stopped(name: str, model_folder: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    recipe = recipe_for(tmp_path, name, model_folder, max_steps=8, save_every=5)
    found = []
    for checkpoint in (None, recipe.output / CHECKPOINTS / "checkpoint-5"):
        model = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), recipe)
        _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), checkpoint=checkpoint, quiet=True)
        found.append((logits(model), [line["loss"] for line in log if "loss" in line]))
    (whole, whole_log), (resumed, resumed_log) = found
    assert torch.equal(whole, resumed)
    assert whole_log == resumed_log


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning"])
def test_learned_prompts_generate_what_their_logits_say(name: str, model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, name, model_folder)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), recipe).eval()
    rows = [[5, 9, 11, 3, 7, 22], [39, 2, 17]]
    expected = []
    for row in rows:
        for _ in range(4):
            with torch.no_grad():
                row = [*row, int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())]
        expected.append(row[-4:])
    padded = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = (padded != 0).long()
    if name == "prefix":  # its tokens are no part of the rows
        made = model.generate(input_ids=padded, attention_mask=mask, **words)
    else:
        made = generate_behind_prompt(model, padded, mask, **words)
    assert made[:, : padded.shape[1]].tolist() == padded.tolist()
    assert made[:, -4:].tolist() == expected


def test_adalora_ends_with_the_mean_rank_it_was_given(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adalora", model_folder)
    output = multiflora.train(recipe, quiet=True).output
    config = json.loads((output / "adapter_config.json").read_text())
    kept = [sum(mask) for mask in config["rank_pattern"].values()]
    assert (config["total_step"], config["target_r"]) == (10, 2)
    assert sum(kept) == 2 * len(kept)
    assert len(set(kept)) > 1  # pruned where it matters least, not everywhere alike


@pytest.mark.parametrize(
    ("method", "train", "message"),
    [
        ("prompt", {"packing": True}, r"train.packing is true, but prompt puts its virtual tokens before each row"),
        ("prefix", {"gradient_checkpointing": True}, r"prefix tuning works through the cache"),
        ({"name": "adalora", "r": 4}, {}, r"method.r is not a setting of adalora"),
        ({"name": "adalora", "init_r": 4, "target_r": 4}, {}, "target_r must be less than init_r"),
        ({"name": "adalora", "tinit": 6, "tfinal": 6}, {}, r"the run has 10 steps"),
        ({"name": "pissa", "init_lora_weights": "gaussian"}, {}, r"pissa starts by a singular value decomposition"),
        ({"name": "loraplus", "loraplus_lr_ratio": 0}, {}, r"loraplus_lr_ratio is 0; it must be a number above 0"),
        ({"name": "full", "r": 8}, {}, r"method.r is not a setting of full"),
        ({"name": "losparse", "r": 8}, {}, r"method.r is not a setting of losparse"),
        ({"name": "losparse", "keep": 1.5}, {}, r"method: keep is 1.5; expected less than 1"),
        ({"name": "losparse", "start": 0.6, "end": 0.5}, {}, r"start is 0.6 and end is 0.5; together they must be"),
        ({"name": "rslora", "use_rslora": False}, {}, r"rslora is peft's LoraConfig with use_rslora=True"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    method: Any, train: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, method, model="no/such-model-is-ever-looked-for", **train)
    with pytest.raises(ConfigError, match=message):
        multiflora.train(recipe, quiet=True)
