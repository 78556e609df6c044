"""Rows that leave their batch answer as each does by itself, and no row is computed when half of them are done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_models import MODELS, POSITIONS, VOCABULARY, made
from transformers import MambaConfig

from multiflora.generation import RowStops, generate_leaving, may_leave

PAD, END, WIDTH = 0, 1, 6


class Letters:
    """A tokenizer of one letter a token."""

    def batch_decode(self, rows: torch.Tensor) -> list[str]:
        return ["".join(chr(97 + i) for i in row) for row in rows.tolist()]


def asked_of(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[PAD] * (WIDTH - len(row)) + row for row in prompts]
    masks = [[0] * (WIDTH - len(row)) + [1] * len(row) for row in prompts]
    return torch.tensor(rows), torch.tensor(masks)


def answering(name: str) -> Any:
    """A model that ends some answers early: a small bias for the end of text, and weights large enough to differ."""
    model = made(MODELS[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = END
    return model


def up_to_the_end(row: list[int], stops: RowStops) -> list[int]:
    """What counts of a row: up to its first end of text, or to the step at which its stop came up."""
    for length in range(WIDTH + 1, len(row) + 1):
        if row[length - 1] == END or bool(stops(torch.tensor([row[:length]]), None)):
            return row[:length]
    return row


prompts_ = st.lists(st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=WIDTH), min_size=1, max_size=9)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "positions from the mask"])  # not in float64
def test_each_row_is_what_it_is_alone(name: str) -> None:
    model = answering(name)
    stops = RowStops(["m", "q"], Letters(), WIDTH)
    settings: dict[str, Any] = {"max_length": POSITIONS, "do_sample": False, "use_cache": True}

    @given(prompts_)
    def each(prompts: list[list[int]]) -> None:
        ids, mask = asked_of(prompts)
        found = generate_leaving(model, ids, mask, stops=stops, pad=PAD, **settings)
        for row, own, seen in zip(found.tolist(), ids, mask, strict=True):
            alone = model.generate(
                input_ids=own[None],
                attention_mask=seen[None],
                stopping_criteria=[stops],
                pad_token_id=PAD,
                **settings,
            )
            assert up_to_the_end(row, stops) == up_to_the_end(alone[0].tolist(), stops)

    each()


def test_finished_rows_are_not_computed() -> None:
    model = answering("rotary positions")
    torch.manual_seed(0)
    ids, mask = asked_of(torch.randint(2, VOCABULARY, (16, WIDTH)).tolist())
    stops = RowStops(["m", "q", "c"], Letters(), WIDTH)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    found = generate_leaving(model, ids, mask, stops=stops, max_length=POSITIONS, pad=PAD, do_sample=False)
    lengths = [len(up_to_the_end(row, stops)) - WIDTH for row in found.tolist()]
    assert len(set(lengths)) > 3  # else nothing is seen here
    for step, computed in enumerate(rows):
        assert computed <= max(2 * sum(length > step for length in lengths), 1) or step == 0


def test_what_counts_from_the_prompt_is_left_to_one_call() -> None:
    model = made(MODELS["rotary positions"])
    assert may_leave(model)
    model.generation_config.min_new_tokens = 3
    assert not may_leave(model)
    recurrent = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert not may_leave(made(recurrent))
    assert not may_leave(torch.nn.Linear(2, 2))
