"""vLLM serves adapters of ours as they are, gates and all: folders named in ``--lora-modules``, or one alone, compiled
along, in ``--hf-overrides``.

vLLM calls `register` in each of its processes, by the entry point ``vllm.general_plugins``. It is called with every
model, so this file imports nothing heavy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

__all__ = ["ARCHITECTURE", "SEEN", "register"]

ARCHITECTURE = "MultifloraForCausalLM"
"""What ``architectures`` says of a base model with one of our adapters."""
SEEN = "0.32."
"""The versions of vLLM among whose adapters ours were seen to be served."""


class _Check:
    """What vLLM asks before it starts an engine, where it asks such questions of its own models."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Let the base's own class have its say."""
        for own in _of_base(model_config):
            own.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot work, and let the base's own class have its say."""
        from multiflora.integrations.vllm.section import check

        check(vllm_config)
        for own in _of_base(vllm_config.model_config):
            own.verify_and_update_config(vllm_config)


def _of_base(model_config: Any) -> Iterator[Any]:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from multiflora.integrations.vllm.section import base_architectures

    yield from (MODELS_CONFIG_MAP[name] for name in base_architectures(model_config) if name in MODELS_CONFIG_MAP)


def register() -> None:
    """Tell vLLM of our architecture, and let it load adapters of ours among its own."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(ARCHITECTURE, "multiflora.integrations.vllm.model:MultifloraForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = _Check
    _replace_manager()


def _replace_manager() -> None:
    """Let workers make our manager of adapters, in the versions of vLLM whose own it was made for."""
    import vllm
    from vllm.v1.worker import lora_model_runner_mixin

    if vllm.__version__.startswith(SEEN):
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _manager
    else:
        logging.getLogger(__name__).warning(
            "vLLM %s is not %sx, with which multiflora serves adapters beside others (--lora-modules); one adapter a "
            "server works by --hf-overrides.",
            vllm.__version__,
            SEEN,
        )


def _manager(*words: Any, **more: Any) -> Any:
    from multiflora.integrations.vllm.many import RoutedWorkerManager

    return RoutedWorkerManager(*words, **more)
