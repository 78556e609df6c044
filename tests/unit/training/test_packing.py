"""Packing is for models that keep the examples of a row apart, which is tried out and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from multiflora.errors import ConfigError
from multiflora.training.packing import require_separate_examples


def test_a_model_of_transformers_keeps_them_apart(tiny_llama) -> None:
    model = tiny_llama().train()
    require_separate_examples(model)
    assert model.training
    require_separate_examples(model.eval())
    assert not model.training


class Leaky(nn.Module):
    """A recurrent model: what came before in the row is never forgotten."""

    device = torch.device("cpu")

    class config:  # noqa: N801
        _attn_implementation = "no"

    def __init__(self, leak: float, size: int = 40) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.leak = nn.Embedding(size, size), leak

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids, position_ids, use_cache) -> CausalLMOutput:
        assert position_ids.tolist() == [[*range(8), *range(6)]]
        x = self.embed(input_ids)
        return CausalLMOutput(logits=x + self.leak * x.cumsum(1))


def test_a_model_that_remembers_is_refused() -> None:
    for size in (40, 100):
        with pytest.raises(ConfigError, match=r"Leaky with no attention lets an example see the one before it"):
            require_separate_examples(Leaky(0.1, size))
        with pytest.raises(ConfigError, match="Leaky"):
            require_separate_examples(Leaky(1e-2, size))
        require_separate_examples(Leaky(1e-6, size))  # rounding
