"""Which logits a batch needs, which requests share a row, and when a row is finished."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiflora.evaluation.model import batches_of, tail_length
from multiflora.generation import RowStops

ids = st.lists(st.integers(0, 5), min_size=1, max_size=6)
requests_ = st.lists(st.tuples(st.none(), ids, ids), min_size=1, max_size=12)


@given(requests_, st.integers(1, 5))
def test_every_request_is_in_one_batch_and_no_batch_has_too_many_rows(requests: list[Any], size: int) -> None:
    batches = batches_of(requests, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(requests)))
    for batch in batches:
        rows = {tuple(requests[i][1] + requests[i][2][:-1]) for i in batch}
        assert len(rows) <= size
    longest = [max(len(requests[i][1] + requests[i][2]) for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(requests_, st.integers(6, 20))
def test_the_tail_holds_every_position_that_is_scored_and_no_more(requests: list[Any], context: int) -> None:
    lengths = [min(len(c) + len(w), context + 1) - 1 for _, c, w in requests]
    width = max(lengths)
    needed = [p for n, (_, _, w) in zip(lengths, requests, strict=True) for p in range(max(n - len(w), 0), n)]
    assert tail_length(requests, context) == width - min(needed)


class Letters:
    """A tokenizer of one letter a token."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(c) for c in text]

    def batch_decode(self, rows: torch.Tensor) -> list[str]:
        return ["".join(map(chr, row)) for row in rows.tolist()]


@pytest.mark.parametrize(
    ("texts", "prompt_length", "expected"),
    [
        (["promptabQ:", "promptabcd"], 6, [True, False]),
        (["promptab\ncd", "promptabcde"], 6, [True, False]),
        (["promptQ:ab", "promptabcd"], 8, [False, False]),  # the prompt's own text is not the answer's
        (["prompt\n\n\n\n", "prompt\nab\n"], 6, [False, True]),  # a line end before an answer does not end it
    ],
)
def test_a_row_is_finished_by_any_stop_in_its_own_answer(
    texts: list[str], prompt_length: int, expected: list[bool]
) -> None:
    stops = RowStops(["Q:", "\n"], Letters(), prompt_length)
    tokens = torch.tensor([[ord(c) for c in text] for text in texts])
    assert stops(tokens, None).tolist() == expected


def test_without_stops_no_row_is_finished() -> None:
    assert RowStops([], Letters(), 0)(torch.tensor([[65, 66]]), None).tolist() == [False]
