"""Collated batches keep every token, label and task in its place."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from multiflora.data.collate import Collator

EXAMPLES = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "task_id": 0},
    {"input_ids": [3, 4], "labels": [-100, 4], "task_id": 2},
    {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "task_id": 1},
]


def test_padding_masks_what_it_adds() -> None:
    batch = Collator(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [1, 2, 3, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, 4, -100, -100, -100], [-100, -100, 3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch["task_id"].tolist() == [0, 2, 1]
    assert batch["row_length"].tolist() == [5, 2, 3]


def test_folding_keeps_tokens_positions_and_tasks_together() -> None:
    batch = Collator(pad_token_id=0, packing=True, max_length=5)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, -100, 3, -100, 4]]
    assert batch["task_id"].tolist() == [[0] * 5, [1, 1, 1, 2, 2]]
    assert batch["row_length"].tolist() == [5, 5]
    assert "attention_mask" not in batch  # with one, transformers would not look at the positions


def test_the_fill_of_a_folded_row_is_an_example_of_its_own_without_loss() -> None:
    batch = Collator(pad_token_id=0, packing=True, max_length=6)([EXAMPLES[0], EXAMPLES[2], EXAMPLES[2]])
    assert batch["row_length"].tolist() == [5, 6]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0]
    assert batch["labels"][0, 5] == -100
    assert batch["task_id"][0].tolist() == [0] * 6


def test_folding_never_predicts_a_first_token_from_the_example_before() -> None:
    rows = [{"input_ids": [3, 4], "labels": [3, 4], "task_id": 0}] * 2
    batch = Collator(pad_token_id=0, packing=True, max_length=4)(rows)
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_in_a_folded_row_gets_the_logits_it_gets_alone(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    batch = Collator(pad_token_id=0, packing=True, max_length=6)([EXAMPLES[0], EXAMPLES[1], EXAMPLES[2]])
    with torch.no_grad():
        # with a cache, transformers would take the positions for those of one long text
        folded = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([e["input_ids"]])).logits[0] for e in EXAMPLES]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 3, 4]]
    torch.testing.assert_close(folded[0, :5], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(folded[1, :3], alone[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(folded[1, 3:5], alone[1], atol=1e-5, rtol=0)


def test_numbered_examples_keep_their_numbers() -> None:
    numbered = [{**example, "example": 10 + i} for i, example in enumerate(EXAMPLES)]
    assert Collator(pad_token_id=0)(numbered)["example"].tolist() == [10, 11, 12]
    folded = Collator(pad_token_id=0, packing=True, max_length=6)(numbered[::2])["example"]
    assert folded.tolist() == [[10] * 5, [12, 12, 12, -1, -1]]
    assert "example" not in Collator(pad_token_id=0)(EXAMPLES)


def test_weights_go_with_their_rows_and_tokens() -> None:
    weighed = [{**example, "loss_weight": 0.5 / (1 + i)} for i, example in enumerate(EXAMPLES)]
    assert Collator(pad_token_id=0)(weighed)["loss_weight"].tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    folded = Collator(pad_token_id=0, packing=True, max_length=6)(weighed[:2])["loss_weight"]
    assert folded.tolist() == [[0.5] * 5, [0.25, 0.25, 0.0, 0.0, 0.0]]
