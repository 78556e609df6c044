"""The best adapter: which it is, when it is time to stop, and that it comes back as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import ConfigError
from multiflora.evaluation.results import goodness
from multiflora.training.adapter import adapter_config, add_adapter, probe
from multiflora.training.best import KeepBest, best_of, is_over
from tests.integration.toys import make_recipe


def points(*values: float) -> list[dict[str, Any]]:
    return [{"step": 2 * (i + 1), "scores": {"macro": value}} for i, value in enumerate(values)]


def macro(scores: Mapping[str, Any]) -> float:
    return float(scores["macro"])


@pytest.mark.parametrize(
    ("values", "best", "over"),
    [((1.0,), 0, False), ((1.0, 3.0, 2.0), 1, False), ((1.0, 3.0, 2.0, 3.0), 1, True), ((1.0, 2.0, 3.0), 2, False)],
)
def test_the_first_of_the_highest_is_the_best_and_patience_counts_from_it(
    values: tuple[float, ...], best: int, over: bool
) -> None:
    assert best_of(points(*values), macro) == best
    assert is_over(points(*values), macro, 2) is over
    assert not is_over(points(*values), macro, None)


def test_before_the_first_scores_nothing_is_over() -> None:
    assert not is_over([], macro, 1)


class Training:
    """As much of a trainer as the callback sees."""

    def __init__(self, best: KeepBest, *, strategy: str = "no") -> None:
        self.best, self.control, self.state = best, TrainerControl(), TrainerState(max_steps=9)
        self.args = TrainingArguments("out", report_to="none", save_strategy=strategy)

    def step(self, model: Any, score: float | None = None) -> None:
        self.state.global_step += 1
        if score is not None:
            self.state.log_history.append({"step": self.state.global_step, "scores": {"macro": score}})
        self.best.on_step_end(self.args, self.state, self.control, model=model)


@pytest.mark.parametrize("method", ["lora", "rlora", "deltalora", "dora", "pissa", "prompt", "full"])
def test_the_model_gets_back_what_it_was_at_its_best(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, method: str
) -> None:
    model = add_adapter(tiny_llama(), make_recipe(tmp_path, method))

    def learn() -> None:
        """Whatever a training may change: all that is trained."""
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn_like(weight)

    best = KeepBest(macro)
    run = Training(best)
    learn()
    run.step(model, 0.5)
    expected = probe(model)
    for score in (0.25, None):
        learn()
        run.step(model, score)
    assert not probe(model).equal(expected)
    best.save(tmp_path)
    again = KeepBest(macro)  # as in a resumed run
    again.load(tmp_path)
    again.put_back(model)
    assert probe(model).equal(expected)
    assert not run.control.should_training_stop


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_training_that_gets_no_better_ends_and_saves_where_it_saves_anyway(strategy: str) -> None:
    model = torch.nn.Linear(1, 1)
    run = Training(KeepBest(macro, 1), strategy=strategy)
    run.step(model, 0.5)
    run.step(model)  # a step without scores is no score without gain
    assert not run.control.should_training_stop
    run.step(model, 0.5)
    assert run.control.should_training_stop
    assert run.control.should_save is (strategy == "steps")


def test_scores_of_a_task_of_which_less_is_better_do_not_count_beside_others() -> None:
    one = {"n": 9, "stderr": None, "nll": None, "other": {}, "group": "tasks"}
    nats = {"c": {"score": 3.0, "metric": "nll", **one}, "d": {"score": 1.0, "metric": "nll", **one}}
    both = {"tasks": {"a": {"score": 0.25, "metric": "acc", **one}, **nats}, "macro": 0.25}
    assert goodness(both, "worst") == goodness(both, "macro") == 0.25
    alone = {"tasks": nats, "macro": None}
    assert (goodness(alone, "macro"), goodness(alone, "worst")) == (-2.0, -3.0)
    diverged = {"tasks": {"c": {**nats["c"], "score": float("nan")}}, "macro": None}
    found = [{"step": 1, "scores": diverged}, {"step": 2, "scores": alone}]
    assert best_of(found, partial(goodness, by="worst")) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("adalora", "evaluate.keep_best is 'macro', but adalora takes ranks away until"),
        ("losparse", "evaluate.keep_best is 'macro', but losparse takes rows of its weights away until"),
        ("lorahub", "evaluate.every is 2, but lorahub trains a LoRA for each task"),
    ],
)
def test_a_method_without_an_earlier_best_is_refused(tmp_path: Path, method: str, message: str) -> None:
    plain = make_recipe(tmp_path, method)
    kept = {"every": 2, "keep_best": "macro"}
    with pytest.raises(ConfigError, match=message):
        adapter_config(plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update=kept)}))
