"""What a training shows goes to a tracker, too; one that cannot be had is told of before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import multiflora
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.training.adapter import add_adapter
from multiflora.training.fit import fit
from tests.integration.toys import make_recipe, make_tokenizer

TinyLlama = Callable[..., LlamaForCausalLM]


def test_tensorboard_gets_every_figure_of_the_log(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = make_recipe(tmp_path, "rlora", max_steps=4, log_every=2, report_to="tensorboard")
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"every": 2})})
    tokenizer = make_tokenizer()
    model = add_adapter(tiny_llama(vocab_size=len(tokenizer)), recipe)
    scores = iter([{"tasks": {"echo": {"score": value}}, "macro": value} for value in (0.25, 0.5)])
    examples = encode_tasks(recipe, tokenizer)
    _, log = fit(model, tokenizer, recipe, examples, quiet=True, validate=lambda model: next(scores))
    [file] = recipe.output.rglob("events.out.tfevents.*")
    read = events.EventAccumulator(str(file.parent))
    read.Reload()
    written = {tag: [event.value for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    for key in ("loss", "loss/echo", "loss/next", "routing/entropy", "routing/least_load", "tokens_per_second"):
        assert written[f"train/{key}"] == pytest.approx([line[key] for line in log if key in line], rel=1e-5)
    assert written["train/validation/macro"] == written["train/validation/echo"] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tensorbord", ConfigError, r"names 'tensorbord', which transformers does not know; did you mean tensorboard"),
        ("dvclive", EnvironmentProblem, r"names dvclive, whose package is not installed: pip install dvclive"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_told_of_at_once(
    name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, "lora", model="no/such-model-is-ever-looked-for", report_to=name)
    with pytest.raises(error, match=message):
        multiflora.train(recipe, quiet=True)
