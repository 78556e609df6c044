"""peft's tests on decoders OPT, GPT2, GPT-J, Llama, Qwen2 and Gemma3."""

from peft_tests import test_decoder_models as theirs
from shim import OURS, LoraOrOurs, settings

theirs.ALL_CONFIGS[:] = [(config, settings(config, task_type="CAUSAL_LM", target_modules=None)) for config in OURS]
theirs.LoraConfig = LoraOrOurs


class TestDecoderModels(theirs.TestDecoderModels):
    pass
