"""peft's tests on sequence classifiers."""

from peft_tests import test_seq_classifier as theirs
from shim import OURS, LoraOrOurs, settings

theirs.ALL_CONFIGS[:] = [(config, settings(config, task_type="SEQ_CLS", target_modules=None)) for config in OURS]
theirs.LoraConfig = LoraOrOurs


class TestSequenceClassificationModels(theirs.TestSequenceClassificationModels):
    pass
