"""The architecture that vLLM is told: the base model's own class, with an adapter's branches beside its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from multiflora.export.saved import open_adapter
from multiflora.integrations.vllm.branches import attach
from multiflora.integrations.vllm.section import NAME_TASK, base_architectures, section_of, task_of

__all__ = ["MultifloraForCausalLM"]


class MultifloraForCausalLM(nn.Module):
    """What vLLM looks up; to make one gives a model of the base's class.

    The methods are those by which vLLM knows a model that writes text. None of them ever runs.
    """

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        """Build the base model as vLLM would, and attach the adapter."""
        model_config = vllm_config.model_config
        section = section_of(model_config.hf_config)
        adapter = open_adapter(section.adapter)
        ours, own = model_config.hf_config.architectures, base_architectures(model_config)
        made, _ = model_config.registry.resolve_model_cls(own, model_config)
        model_config.hf_config.architectures = own  # some classes read it
        try:
            model = made(vllm_config=vllm_config, prefix=prefix)
        finally:
            model_config.hf_config.architectures = ours
        attach(model, adapter, task_of(adapter, section.task, NAME_TASK), model_config.dtype)
        return model

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base class's."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor, **words: Any) -> Tensor:
        """The base class's."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The base class's."""
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base class's."""
        raise NotImplementedError
