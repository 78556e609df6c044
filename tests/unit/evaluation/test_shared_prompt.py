"""What is scored behind a prompt that is read once is what each choice scores by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_models import MODELS, PAD, POSITIONS, SMALL, VOCABULARY, made
from peft import get_peft_model
from transformers import MambaConfig, PreTrainedConfig, RecurrentGemmaConfig

import multiflora
from multiflora.evaluation.shared_prompt import by_prompt, score_behind
from multiflora.methods import build_config

KEEPS_STATES: dict[str, PreTrainedConfig] = {
    "a recurrent model": MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4),
    "recurrent layers beside attention": RecurrentGemmaConfig(
        **SMALL, num_attention_heads=2, intermediate_size=32, lru_width=16, attention_window_size=4
    ),
}

ids = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=8)
questions = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=5)


def alone(model: Any, prompt: list[int], wanted: list[int]) -> tuple[float, bool]:
    """The score by its definition, one text and one pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + wanted[:-1]])).logits[0, len(prompt) - 1 :]
    targets = torch.tensor(wanted)
    total = logits.log_softmax(-1)[range(len(wanted)), targets].sum()
    return float(total), bool((logits.argmax(-1) == targets).all())


def requests_of(asked: list[tuple[list[int], list[list[int]]]]) -> list[tuple[Any, list[int], list[int]]]:
    return [(None, prompt, choice) for prompt, choices in asked for choice in choices]


def check(model: Any, asked: Any, size: int) -> None:
    requests = requests_of(asked)
    prompts = by_prompt(requests, POSITIONS, least=1)
    told: list[None] = []
    found = score_behind(model, prompts, size, PAD, lambda: told.append(None))
    assert found is not None
    assert len(told) == len(found) == sum(map(len, prompts.values()))
    for i, (total, is_greedy) in found.items():
        expected, likeliest = alone(model, requests[i][1], requests[i][2])
        assert total == pytest.approx(expected, abs=1e-4)
        assert is_greedy == likeliest


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_each_choice_by_itself(name: str) -> None:
    model = made(MODELS[name])

    @given(questions, st.integers(1, 3))
    def each(asked: Any, size: int) -> None:
        check(model, asked, size)

    each()


LONG = [([*range(1, 21)], [[3, 4], [5, 6, 7, 8], [9, 9, 9, 9, 9]]), ([2], [[1, 2, 3], [4, 5], [6]])]


@pytest.mark.parametrize("name", MODELS)
def test_no_position_is_asked_for_that_the_model_does_not_have(name: str) -> None:
    check(made(MODELS[name]), LONG, 2)


@pytest.mark.parametrize("method", ["multilora", "rlora", "mtllora", "loramoe"])
def test_adapters_score_alike(method: str) -> None:
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "task_names": ["a", "b"]}
    config = build_config(method, settings)
    model = get_peft_model(made(MODELS["rotary positions"]), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    with multiflora.task(model, "b"):
        check(model, LONG, 2)


@pytest.mark.parametrize("name", KEEPS_STATES)
def test_what_keeps_no_keys_and_values_is_left_to_the_ordinary_way(name: str) -> None:
    model = made(KEEPS_STATES[name])
    assert score_behind(model, by_prompt(requests_of(LONG), POSITIONS, least=1), 2, PAD, lambda: None) is None


@given(questions, st.integers(4, 12), st.integers(1, 30))
def test_only_what_fits_and_saves_work_is_taken(asked: Any, room: int, least: int) -> None:
    requests = requests_of(asked)
    taken = by_prompt(requests, room, least=least)
    for prompt, choices in taken.items():
        inputs = {(*prompt, *wanted[:-1]) for _, wanted in choices}
        alone, behind = sum(map(len, inputs)), len(prompt) + sum(len(wanted) - 1 for _, wanted in choices)
        assert alone - behind >= least or len(inputs) < len(choices)  # equal ones share a row anyway
        for i, wanted in choices:
            assert (tuple(requests[i][1]), requests[i][2]) == (prompt, wanted)
            assert len(prompt) + len(wanted) - 1 <= room
