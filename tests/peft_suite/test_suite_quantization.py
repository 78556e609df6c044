"""peft's tests on quantised models: bitsandbytes 8 and 4 bits, two kinds of torchao."""

from peft_tests import test_quantization as theirs
from shim import OURS, settings

theirs.TEST_CASES[:] = [(config, settings(config, target_modules=["q_proj", "v_proj"])) for config in OURS]


class TestQuantization(theirs.TestQuantization):
    pass
