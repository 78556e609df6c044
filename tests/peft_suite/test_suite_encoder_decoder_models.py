"""peft's tests on T5 and Bart."""

from peft_tests import test_encoder_decoder_models as theirs
from shim import OURS, LoraOrOurs, settings

theirs.ALL_CONFIGS[:] = [(config, settings(config, task_type="SEQ_2_SEQ_LM", target_modules=None)) for config in OURS]
theirs.LoraConfig = LoraOrOurs


class TestEncoderDecoderModels(theirs.TestEncoderDecoderModels):
    pass
