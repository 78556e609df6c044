"""ROUGE-L against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiflora.evaluation.metrics import rouge_l

words = st.lists(st.sampled_from(["red", "blue", "one", "two"]), min_size=1, max_size=6)


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return longest_common(a[:-1], b[:-1]) + 1
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@given(words, words)
def test_it_is_the_f_measure_of_the_longest_common_subsequence(reference: list[str], text: list[str]) -> None:
    common = longest_common(reference, text)
    expected = 2 * common / (len(reference) + len(text))
    assert rouge_l(" ".join(reference), " ".join(text)) == pytest.approx(expected)


def test_nothing_said_is_nothing_right() -> None:
    assert rouge_l("red", "") == 0.0
