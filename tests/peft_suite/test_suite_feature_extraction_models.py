"""peft's tests on BERT, RoBERTa and both DeBERTas."""

from peft_tests import test_feature_extraction_models as theirs
from shim import OURS, LoraOrOurs, settings

theirs.ALL_CONFIGS[:] = [
    (config, settings(config, task_type="FEATURE_EXTRACTION", target_modules=None)) for config in OURS
]
theirs.LoraConfig = LoraOrOurs


class TestPeftFeatureExtractionModel(theirs.TestPeftFeatureExtractionModel):
    pass
