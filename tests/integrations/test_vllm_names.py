"""What multiflora calls of vLLM's LoRA, none of which vLLM promises to keep, by name: a test says which moved."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make integrations")

import vllm

from multiflora.integrations.vllm import SEEN, many, register

LORA = "vllm.lora."

NAMES: dict[str, tuple[str, ...] | type | None] = {
    # what `register` replaces, and what the workers call it with
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": None,
    # what is in its place, and what it overrides
    LORA + "worker_manager:LRUCacheWorkerLoRAManager": ("vllm_config", "device", "embedding_modules"),
    LORA + "worker_manager:LRUCacheWorkerLoRAManager._manager_cls": type,
    LORA + "worker_manager:LRUCacheWorkerLoRAManager._load_adapter": ("self", "lora_request"),
    LORA + "worker_manager:LRUCacheWorkerLoRAManager.set_active_adapters": ("self", "requests", "mapping"),
    LORA + "model_manager:LRUCacheLoRAModelManager": ("model", "lora_config", "device", "vllm_config"),
    LORA + "model_manager:LRUCacheLoRAModelManager.set_adapter_mapping": ("self", "mapping"),
    LORA + "model_manager:LRUCacheLoRAModelManager.get_adapter": ("self", "adapter_id"),
    # an adapter as vLLM keeps it
    LORA + "lora_model:LoRAModel": ("lora_model_id", "rank", "loras"),
    LORA + "lora_weights:LoRALayerWeights": ("module_name", "rank", "lora_alpha", "lora_a", "lora_b"),
    LORA + "request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    LORA + "layers:LoRAMapping": ("index_mapping",),
    # a layer with adapters, and what it is told to add them with
    LORA + "layers.base_linear:BaseLinearLayerWithLoRA.set_mapping": ("self", "punica_wrapper"),
    LORA + "layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("self", "x", "output"),
    LORA + "punica_wrapper.punica_base:PunicaWrapperBase.add_lora_linear": ("self", "y", "x"),
}
"""Name -> parameters that it has, where it is called, or what it is."""

ATTRIBUTES = {
    LORA + "worker_manager:WorkerLoRAManager": ("_adapter_manager",),
    LORA + "model_manager:LoRAModelManager": ("modules", "packed_modules_mapping", "model", "lora_config", "device"),
    LORA + "layers.base_linear:BaseLinearLayerWithLoRA": ("base_layer",),
    LORA + "layers.base:BaseLayerWithLoRA": ("punica_wrapper",),
}
"""Class -> attributes of its instances, which it sets itself."""

MISSING = "is not what it was in vLLM 0.32: see multiflora/integrations/vllm/many.py, which counts on it"


def found(name: str) -> Any:
    module, _, path = name.partition(":")
    one = import_module(module)
    for part in path.split("."):
        assert hasattr(one, part), f"{name} {MISSING}"
        one = getattr(one, part)
    return one


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_where_it_was(name: str) -> None:
    one, wanted = found(name), NAMES[name]
    if isinstance(wanted, tuple):
        parameters = tuple(inspect.signature(one).parameters)
        kept = [word for word in parameters if word in wanted]
        assert kept == list(wanted), f"{name}{parameters} {MISSING}: {wanted}"
    elif wanted is not None:
        assert isinstance(one, wanted), f"{name} {MISSING}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_instance_has_what_it_had(name: str) -> None:
    source = inspect.getsource(found(name))
    for attribute in ATTRIBUTES[name]:
        assert f"self.{attribute}" in source, f"{name}.{attribute} {MISSING}"


def test_workers_make_our_manager_in_the_versions_that_were_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.worker import lora_model_runner_mixin as runner

    assert vllm.__version__.startswith(SEEN)
    monkeypatch.setattr(runner, "LRUCacheWorkerLoRAManager", many.LRUCacheWorkerLoRAManager)
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    register()
    assert runner.LRUCacheWorkerLoRAManager is many.LRUCacheWorkerLoRAManager
    assert "vLLM 0.99.0 is not 0.32.x" in caplog.text
    monkeypatch.setattr(vllm, "__version__", f"{SEEN}0")
    register()
    assert runner.LRUCacheWorkerLoRAManager is not many.LRUCacheWorkerLoRAManager
