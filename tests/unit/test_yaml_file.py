from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiflora.errors import ConfigError
from multiflora.yaml_file import dump_yaml, parse_yaml, read_yaml


def test_numbers_with_an_exponent_are_numbers_and_yes_and_no_stay_words():
    read = parse_yaml("{lr: 1e-4, big: 2E5, half: .5, n: 3, labels: [yes, no, on], flag: true, none: null}", "x")
    assert read == {
        "lr": 1e-4,
        "big": 2e5,
        "half": 0.5,
        "n": 3,
        "labels": ["yes", "no", "on"],
        "flag": True,
        "none": None,
    }
    assert type(read["n"]) is int


def test_a_key_given_twice_is_refused_with_its_line():
    with pytest.raises(ConfigError, match=r"r\.yaml, line 3, column 1: .*'seed' is given twice"):
        parse_yaml("seed: 1\noutput: x\nseed: 2\n", "r.yaml")


def test_bad_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: x\ntrain: {learning_rate: 1e-4\nseed: 0\n")
    with pytest.raises(ConfigError, match=r"r\.yaml, line 3, column \d+: not valid YAML"):
        read_yaml(path)


def test_a_missing_file_says_which_yaml_files_are_there(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 0")
    with pytest.raises(ConfigError, match=r"recip\.yaml does not exist; the YAML files there: recipe\.yaml"):
        read_yaml(tmp_path / "recip.yaml")


def test_a_folder_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; expected a YAML file"):
        read_yaml(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"b\.yaml is not UTF-8 text"):
        read_yaml(tmp_path / "b.yaml")


def test_control_characters_are_a_config_error():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("a: \x00", "x")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
)


@given(VALUES)
def test_what_is_written_reads_back_equal(value):
    assert parse_yaml(dump_yaml(value), "x") == value


def test_text_of_several_lines_is_written_as_a_block():
    assert dump_yaml({"prompt": "a\nb"}) == "prompt: |-\n  a\n  b\n"


def bomb() -> str:
    names = "abcdefghij"
    lines = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(names)]
    return "\n".join(["a: &a [x, x]", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), r"line \d+: .*values and aliases come to more than 200,000"),
        ("[" * 60 + "]" * 60, "more than 50 lists and mappings stand within one another"),
        ("- " * 5000 + "a", "more than 50 lists and mappings"),
        ("{a: " * 100_000, "more than 50 lists and mappings"),
        ("a: &a [*a]", r"line 1: \*a stands within itself"),
        ("x" * 4_000_001, "longer than 4,000,000 characters"),
        ("seed: 0x" + "f" * 5000, "more than 300 digits"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("day: 2026-99-99", "'2026-99-99' is no timestamp"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("a: \ud800", "not valid YAML"),
    ],
)
def test_yaml_that_lies_is_refused_before_it_is_built(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "r.yaml")


def test_anchors_and_merge_keys_work():
    text = "defaults: &d {r: 4, seed: 0}\nhere: {<<: *d, r: 8}\nthere: *d"
    assert parse_yaml(text, "x") == {
        "defaults": {"r": 4, "seed": 0},
        "here": {"r": 8, "seed": 0},
        "there": {"r": 4, "seed": 0},
    }


def test_a_device_without_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match=r"/dev/zero is longer than 4,000,000 characters"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(
    "text", ["!!map [a]", "!!set [a]", "? [a]\n: b", "? {a: b}\n: c", "!!omap {a: b}", "!!pairs x", "!!seq {a: b}"]
)
def test_a_tag_or_a_key_that_does_not_go_with_its_value_is_said(text):
    with pytest.raises(ConfigError, match=r"not valid YAML"):
        parse_yaml(text, "x")


def test_a_key_given_twice_among_very_many_is_found():
    """Looking for it took time by the square of their number."""
    with pytest.raises(ConfigError, match=r"the key 'k1' is given twice"):
        parse_yaml("".join(f"k{i}: 1\n" for i in range(60_000)) + "k1: 2", "x")
