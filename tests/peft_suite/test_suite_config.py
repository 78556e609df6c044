"""peft's tests on configs: saving, loading, copying, unknown keys."""

import pytest
from peft_tests import test_config as theirs
from shim import OURS, settings

CASES = [(config, settings(config)) for config in OURS]

# the table is a tuple, which cannot be changed in place: give its tests another one
for test in vars(theirs.TestPeftConfig).values():
    marks = getattr(test, "pytestmark", [])
    for place, mark in enumerate(marks):
        if mark.name == "parametrize" and mark.args[0] == "config_class, mandatory_kwargs":
            marks[place] = pytest.mark.parametrize(mark.args[0], CASES).mark


class TestPeftConfig(theirs.TestPeftConfig):
    pass
