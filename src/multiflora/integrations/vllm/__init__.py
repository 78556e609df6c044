"""vLLM serves an adapter of ours as it is, gates and all: its folder is named in ``--hf-overrides``.

vLLM calls `register` in each of its processes, by the entry point ``vllm.general_plugins``. It is called with every
model, so this file imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["ARCHITECTURE", "register"]

ARCHITECTURE = "MultifloraForCausalLM"
"""What ``architectures`` says of a base model with one of our adapters."""


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
    """Tell vLLM of our architecture."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(ARCHITECTURE, "multiflora.integrations.vllm.model:MultifloraForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = _Check
