"""How much a training may ask for: an order of examples that can be drawn and held, said before it is tried."""

from __future__ import annotations

import pytest

from multiflora.data.mixture import Mixture
from multiflora.errors import ConfigError
from multiflora.training.fit import MOST_EXAMPLES, _check_amount


def mixture(*counts: int) -> Mixture:
    return Mixture(names=("a", "b"), sizes=(8, 1000), counts=counts, seed=0)


@pytest.mark.parametrize(
    ("number", "counts", "words"),
    [
        (10**30, (8, 8), "ask for 1,0+(,0+)+ examples, repeats included; expected at most 100,000,000"),
        (1, (8, 10**15), "ask for 1,0+(,0+)+8 examples, repeats included"),
        (10**7, (8, 8), "about 625,000 passes over task a, which has 8; expected at most 100,000 passes"),
        (10**7, (10**6, 8), "about 1,249,991 passes over task a"),
    ],
)
def test_more_than_can_be_drawn_is_refused(number: int, counts: tuple[int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _check_amount(number, mixture(*counts))


def test_a_long_training_is_none_of_them() -> None:
    _check_amount(10**5, mixture(8, 8))
    _check_amount(MOST_EXAMPLES, Mixture(names=("a",), sizes=(10**6,), counts=(10**6,), seed=0))
