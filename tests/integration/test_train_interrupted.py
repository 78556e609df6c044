"""Runs that are cut short: SIGTERM, a full disk, numbers gone bad. What was saved stays good, and one can go on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from multiflora.cli.errors import TERMINATED, explain
from multiflora.data.prepare import encode_tasks
from multiflora.errors import EnvironmentProblem, Interrupted, TrainingError
from multiflora.recipe import Recipe
from multiflora.training import fit as fit_module
from multiflora.training.adapter import add_adapter
from multiflora.training.checkpoint import last_checkpoint
from multiflora.training.fit import fit
from multiflora.training.output import disk_guard
from tests.integration.toys import make_recipe, make_tokenizer

TinyLlama = Callable[..., LlamaForCausalLM]


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, do: Callable[[Any], None]) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            self.do(model)


def run(
    tiny_llama: TinyLlama, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, at: At | None = None, **more: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tokenizer = make_tokenizer()
    model = add_adapter(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2), recipe)
    if at is not None:
        trainer = fit_module.MultitaskTrainer
        with_it = lambda **words: trainer(**words | {"callbacks": [at, *words["callbacks"]]})  # noqa: E731
        monkeypatch.setattr(fit_module, "MultitaskTrainer", with_it)
    try:
        _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True, **more)
    finally:
        monkeypatch.undo()
    return get_peft_model_state_dict(model), log


def figures(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log if "loss" in line]


@pytest.mark.parametrize("save_every", [None, 4])
def test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on_as_if_nothing_had_been(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int | None
) -> None:
    method = {"name": "rlora", "lora_dropout": 0.1}
    whole, log = run(tiny_llama, make_recipe(tmp_path / "whole", method, max_steps=6, log_every=2), monkeypatch)
    recipe = make_recipe(tmp_path / "cut", method, max_steps=6, log_every=2, save_every=save_every)
    before = signal.getsignal(signal.SIGTERM)
    stop = At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"did so after step 3 of 6.*checkpoint-3; go on with --resume") as caught:
        run(tiny_llama, recipe, monkeypatch, stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert explain(caught.value) == (str(caught.value), TERMINATED)
    checkpoint = last_checkpoint(recipe.output)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    again, log_again = run(tiny_llama, recipe, monkeypatch, checkpoint=checkpoint)
    assert all(tensor.equal(again[name]) for name, tensor in whole.items())
    assert figures(log_again) == figures(log)  # the line of steps 3 and 4, too


def test_a_full_disk_leaves_the_checkpoint_before(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, "rlora", max_steps=4, save_every=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = At(2, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard)))
    try:
        with pytest.raises(EnvironmentProblem, match="No space left to write the run"), disk_guard(recipe.output):
            run(tiny_llama, recipe, monkeypatch, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = last_checkpoint(recipe.output)
    assert kept is not None
    assert kept.name == "checkpoint-1"
    assert (kept.parent / "checkpoint-2").exists()
    run(tiny_llama, recipe, monkeypatch, checkpoint=kept)


def poison(model: Any) -> None:
    """Make one word's embedding infinite: only examples that hold it go bad."""
    word = make_tokenizer().convert_tokens_to_ids("3")
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = float("inf")


@pytest.mark.parametrize("packing", [False, True])
def test_a_poisoned_example_stops_the_run_and_is_named(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    recipe = make_recipe(tmp_path, "rlora", max_steps=10, batch_size=4, save_every=2, packing=packing)
    with pytest.raises(TrainingError, match=r"The loss is no longer finite at step 3 \(tasks: ") as caught:
        run(tiny_llama, recipe, monkeypatch, At(2, poison))
    named = set(str(caught.value).partition("bad loss: ")[2].partition(". The run")[0].split(", "))
    examples = encode_tasks(recipe, make_tokenizer())
    batch = examples.take(40, batch_size=None if packing else 4).dataset[8:12]
    three = make_tokenizer().convert_tokens_to_ids("3")
    bad = {name for name, ids in zip(batch["id"], batch["input_ids"], strict=True) if three in ids}
    # attention weighs what it may not see with 0, and 0 times infinity is no number: a folded row goes bad as a whole
    assert bad <= named <= set(batch["id"]) if packing else bad == named
    kept = last_checkpoint(recipe.output)
    assert kept is not None
    assert kept.name == "checkpoint-2"
    assert str(kept) in str(caught.value)


def test_bad_gradients_stop_the_run_before_they_are_saved(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, "rlora", max_steps=10, batch_size=4, save_every=3)

    def spoil(model: Any) -> None:
        trained = next(p for p in model.parameters() if p.requires_grad)
        trained.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(
        TrainingError, match=r"The gradients are no longer finite at step 3 .*examples of the step: \w+"
    ):
        run(tiny_llama, recipe, monkeypatch, At(2, spoil))
    assert last_checkpoint(recipe.output) is None  # step 3 is the first that would have been saved


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_bit_for_bit() -> None:
    tool = Path(__file__).parents[2] / "tools" / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--runs", "3"], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["3 of 3 equal"], done.stdout + done.stderr[-3000:]
