"""Scores of one generated text that need a library; the others are in ``multiflora.tasks.score``. Pure functions."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["rouge_l"]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, text: str) -> float:
    r"""Return ROUGE-L: the F-measure of the longest common subsequence of words, stemmed, from 0 to 1.

    .. math:: P = \frac{|LCS|}{|text|}, \quad R = \frac{|LCS|}{|reference|}, \quad F = \frac{2PR}{P + R}

    Lin 2004 (https://aclanthology.org/W04-1013), section 3.1 with beta = 1; Google's ``rouge-score`` does it.

    Example:
        >>> round(rouge_l("the cat sat", "the cat ran"), 3)
        0.667
    """
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)
