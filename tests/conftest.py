"""What all tests share: no network, one thread, tiny models made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# before anything imports huggingface_hub, which reads it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# and before anything imports triton: our kernels run in its interpreter, as there may be no GPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

# an example that takes long on a busy machine is not a wrong one
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run beside each other, on few cores: threads of their own would only make them wait."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _branches_compiled() -> None:
    """Built before any test: else the first that trains would wait for it and say so."""
    import torch

    from multiflora.ops import native

    native.serve(torch.ones(1))


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a Llama of two layers and width 32, random but always the same; keywords go to its config."""

    def make(**words: Any) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        }
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape | words)).eval()

    return make
