import pytest

from multiflora.errors import ConfigError
from multiflora.tasks import GeneratorSource, load_task
from multiflora.tasks.generator import generator_rows, split_range
from multiflora.tasks.load import examples_of


def test_splits_are_disjoint_ranges_and_more_training_rows_leave_the_test_alone():
    small = GeneratorSource(generator="gcd", sizes={"train": 10, "test": 5})
    large = GeneratorSource(generator="gcd", sizes={"train": 90, "test": 5})
    assert split_range(small, "test") == split_range(large, "test") == range(5)
    assert split_range(small, "validation") == range(5, 5)
    assert split_range(small, "train") == range(5, 15)


def test_rows_follow_from_the_seed():
    one, other = (GeneratorSource(generator="gcd", seed=s, sizes={"test": 3}) for s in (0, 100))
    assert generator_rows(one)[0]["question"] == generator_rows(one.model_copy())[0]["question"]
    assert generator_rows(one)[0]["question"] != generator_rows(other)[0]["question"]


def test_a_prompt_of_the_test_rows_is_no_training_row():
    # two numbers up to 2: four problems, so every training prompt is in the test
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    spec = load_task(
        {
            "name": "t",
            "source": {"generator": "chain_sum", "sizes": {"train": 400, "test": 40}, "settings": settings},
        }
    )
    train, test = ({e.prompt for e in examples_of(spec, split)} for split in ("train", "test"))
    assert not train & test
    assert 0 < len(train) < 400


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"generator": "chain_sums"}, "'chain_sums' is not a reasoning-gym generator; did you mean chain_sum?"),
        (
            {"generator": "gcd", "settings": {"max_valu": 5}},
            "settings.max_valu is not a setting of gcd; did you mean max_value?",
        ),
        ({"generator": "gcd", "settings": {"seed": 5}}, "settings.seed is not a setting of gcd"),
        ({"generator": "gcd", "settings": {"max_value": -5}}, "refuses the settings"),
    ],
)
def test_a_generator_that_cannot_work_is_refused(source, told):
    with pytest.raises(ConfigError, match=told):
        generator_rows(GeneratorSource(**source))
