"""peft's tests of training with torch.compile, with and without Trainer."""

from datasets import Dataset, DatasetDict
from peft_tests import test_torch_compile as theirs
from shim import OURS, named, settings

# tracing is what can go wrong with a method; what inductor makes of the traced graph is not ours, and takes minutes
EAGER = {"backend": "aot_eager", "torch_compile_backend": "aot_eager"}


def quotes() -> DatasetDict:
    rows = [{"quote": "the rose is without why " * 2, "author": "a", "tags": ["b"]}] * 24
    return DatasetDict(train=Dataset.from_list(rows))


theirs.SETTINGS.clear()
theirs.SETTINGS.update({named(config): (config(**settings(config, task_type="CAUSAL_LM")), EAGER) for config in OURS})
# parametrize took the ids and values as views of the dictionary, so this is all
theirs.load_dataset_english_quotes = quotes


class TestTorchCompileCausalLM(theirs.TestTorchCompileCausalLM):
    pass
