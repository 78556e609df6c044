"""peft's tests on small custom models: 60 behaviours, from saving to mixed batches."""

from peft_tests import test_custom_models as theirs
from shim import OURS, LoraOrOurs, named, settings, testing_common

from multiflora.methods.rlora import RandomHeadsConfig

ROWS = {
    "1": {"target_modules": "lin0"},
    "2": {"target_modules": ["lin1"], "use_rslora": True},
    "3": {"target_modules": ["lin0", "lin1"]},
    "4": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}

theirs.TEST_CASES[:] = [
    (f"MLP {row} {named(config)}", "MLP", config, settings(config, **words))
    for config in OURS
    for row, words in ROWS.items()
] + [
    (f"MLP 5 {named(config)} zero heads", "MLP", config, settings(config, target_modules=["lin0"], init_weights="zero"))
    for config in OURS
    if issubclass(config, RandomHeadsConfig)
]
theirs.ALL_PEFT_CONFIG_CLASSES[:] = [config for config in OURS if "num_tasks" not in settings(config)]
theirs.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (
        f"{named(config)} {row}",
        named(config),
        config,
        settings(config, target_modules=["lin0"], init_weights=False),
        settings(config, target_modules=[second], init_weights=False),
    )
    for config in OURS
    for row, second in {"Same": "lin0", "Different": "lin1"}.items()
]
theirs.MIXED_ADAPTER_TEST_CASES[:] = [
    (
        f"{named(config)} mixed adapter",
        config(**settings(config, target_modules=["lin0"], init_weights=False)),
        config(**settings(config, target_modules=["lin0"], init_weights=False, r=32)),
    )
    for config in OURS
]
theirs._skip_if_merging_not_supported = testing_common._skip_if_merging_not_supported
theirs.LoraConfig = LoraOrOurs


class TestPeftCustomModel(theirs.TestPeftCustomModel):
    pass


class TestMultipleActiveAdapters(theirs.TestMultipleActiveAdapters):
    pass


class TestRequiresGrad(theirs.TestRequiresGrad):
    pass


class TestMixedAdapterBatches(theirs.TestMixedAdapterBatches):
    pass


class TestPeftFsdpStateDict(theirs.TestPeftFsdpStateDict):
    pass
