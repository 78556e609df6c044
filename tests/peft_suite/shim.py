"""How peft's unchanged tests come to run on our methods, and which of them do not, with the reason of each.

The tests' tables are lists that ``pytest.mark.parametrize`` holds by reference: replacing their rows before collection
is enough. The files beside this one do that, each for one file of peft's, and inherit peft's test classes.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import peft
import pytest
from peft_tests import testing_common, testing_utils

from multiflora.methods import METHODS
from multiflora.methods.base import Method

# all methods, or those named: one of each kind stands for the rest where nothing of theirs has changed
ASKED = os.environ.get("MULTIFLORA_PEFT_METHODS", " ".join(METHODS)).split()
OURS: dict[type, Method] = {
    method.config: method
    for method in (import_module(METHODS[name].module).METHOD for name in ASKED if METHODS[name].module is not None)
}

Which = Callable[[Method, dict[str, Any]], bool]


def _router(method: Method, parameters: dict[str, Any]) -> bool:
    return method.merges() == "no"


def _any(method: Method, parameters: dict[str, Any]) -> bool:
    return True


def _random_start(method: Method, parameters: dict[str, Any]) -> bool:
    words = parameters.get("config_kwargs", {})
    return method.offset(method.config(**words))


# Every test of ours that is left out: (pattern of its name, for which methods and parameters, reason). Besides these,
# the suite skips what it always skips, and `routers_do_not_merge` below what merges.
SKIPS: tuple[tuple[str, Which, str], ...] = (
    (
        r"test_generate_with_mixed_adapter_batches\[MoeLoraConfig-.*BartForConditionalGeneration",
        lambda method, params: True,
        "this random start of MOELoRA happens to leave the tiny model's greedy text as it is",
    ),
    (
        "test_from_pretrained_cache_dir",
        _any,
        "downloads an adapter into an empty folder, and the hub is out of reach",
    ),
    (
        "test_mixed_adapter_batches_merged_raises",
        _router,
        "router methods do not merge, so no mixed batch can meet a merged adapter",
    ),
    (
        "test_merge_unmerge_unload",
        _router,
        "router methods do not merge, on quantised models either",
    ),
    (
        "test_save_load_roundtrip_fsdp_wrapped",
        _random_start,
        "saves an adapter made with init_weights=False and loads it into one made with a random start: these are not "
        "the same method, as the random start is subtracted; the row with init_weights='zero' runs",
    ),
)


def settings(config_class: type, **more: Any) -> dict[str, Any]:
    """Settings of a row: one task needs no id, and a small alpha suits the learning rates written into the tests."""
    method = OURS[config_class]
    wants_tasks = method.needs_task() or method.loss_needs_task(config_class())
    return {"lora_alpha": 2} | ({"num_tasks": 1} if wants_tasks else {}) | more


def named(config_class: type) -> str:
    """A method's name in test ids."""
    return OURS[config_class].name


# ---- what the suite asks about a method by its class ----------------------------------------------------------------


def routers_do_not_merge(helper: Any) -> Any:
    """peft's skip helper for merging, told of the methods that refuse it."""

    @functools.wraps(helper)
    def wrapped(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
        helper(model_id, config_cls, config_kwargs)
        method = OURS.get(config_cls)
        if method is not None and method.merges() == "no":
            pytest.skip("router methods do not merge: their update is not one matrix")

    return wrapped


class _OrOurs(type(peft.LoraConfig)):
    """Compares equal to our config classes, too: so tests kept for methods that mix adapters run on ours."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is peft.LoraConfig or other in OURS

    def __ne__(cls, other: object) -> bool:
        return not cls == other

    def __hash__(cls) -> int:
        return hash(peft.LoraConfig)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, peft.LoraConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, peft.LoraConfig)


class LoraOrOurs(peft.LoraConfig, metaclass=_OrOurs):
    """Stands for ``LoraConfig`` where a test asks which methods mix adapters in a batch."""


class _SeenAll(dict):
    """peft's tests go online for a model name they have not seen; here every name counts as seen."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


testing_utils._HUB_MODEL_ACCESSES = _SeenAll()
testing_common._skip_if_merging_not_supported = routers_do_not_merge(testing_common._skip_if_merging_not_supported)
# peft skips GPT2 for all but four methods, as theirs know no Conv1D; ours do
testing_common._skip_if_conv1d_not_supported = lambda *args: None
testing_common.LoraConfig = LoraOrOurs


# ---- which tests run ------------------------------------------------------------------------------------------------


def methods_of(item: pytest.Item) -> Iterator[Method]:
    """Our methods among a test's parameters."""
    for value in getattr(item, "callspec", None).params.values() if hasattr(item, "callspec") else ():
        for part in value if isinstance(value, tuple) else (value,):
            kind = part if isinstance(part, type) else type(part)
            if kind in OURS:
                yield OURS[kind]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not about our methods; skip what the table says, with its reason."""
    kept, left_out = [], []
    for item in items:
        methods = list(methods_of(item))
        (kept if methods else left_out).append(item)
        for pattern, which, reason in SKIPS if methods else ():
            if re.search(pattern, item.nodeid) and which(methods[0], item.callspec.params):
                item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
