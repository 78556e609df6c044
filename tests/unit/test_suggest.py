import pytest

from multiflora.suggest import did_you_mean, nearest

KNOWN = ["learning_rate", "batch_size", "gradient_accumulation", "rlora", "lora"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning-rate", "learning_rate"),
        ("Learning_Rat", "learning_rate"),
        ("batchsize", "batch_size"),
        ("grad", "gradient_accumulation"),
        ("rlor", "rlora"),
    ],
)
def test_a_slip_finds_the_name_that_was_meant(typed, meant):
    assert nearest(typed, KNOWN) == meant


def test_nothing_close_gives_no_guess():
    assert nearest("temperature", KNOWN) is None
    assert nearest("x", []) is None


def test_the_sentence_lists_what_is_known_whether_or_not_there_is_a_guess():
    assert did_you_mean("zz", ["b", "a"]) == "known: a, b."
    assert did_you_mean("lor", ["rlora", "lora"]) == "did you mean lora? Known: lora, rlora."
