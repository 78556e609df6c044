"""The layer shapes that are measured: the linear layers of three models, by hand from their configs (no hub needed)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MIXTURE", "SHAPES", "SMOLLM2", "Mixture", "Shape"]


class Shape(NamedTuple):
    """One linear layer: its width in and out, and where it stands."""

    model: str
    layer: str
    d_in: int
    d_out: int

    def __str__(self) -> str:
        return f"{self.model} {self.layer} {self.d_in}→{self.d_out}"


SHAPES = (
    Shape("SmolLM2-135M", "q_proj", 576, 576),
    Shape("SmolLM2-135M", "up_proj", 576, 1536),
    Shape("SmolLM2-135M", "down_proj", 1536, 576),
    Shape("Qwen2.5-0.5B", "q_proj", 896, 896),
    Shape("Qwen2.5-0.5B", "up_proj", 896, 4864),
    Shape("Qwen2.5-0.5B", "down_proj", 4864, 896),
    Shape("Llama-3.1-8B", "q_proj", 4096, 4096),
    Shape("Llama-3.1-8B", "up_proj", 4096, 14336),
    Shape("Llama-3.1-8B", "down_proj", 14336, 4096),
    # the shape of the activation-memory target: up_proj of the Llama-2 generation
    Shape("Llama-2-7B", "up_proj", 4096, 11008),
)


class Mixture(NamedTuple):
    """The experts of one layer, two matrices each: up and gate in one, and down."""

    model: str
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    """Experts of a token."""

    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(d_in, d_out) of an expert's two matrices."""
        return (self.d_model, 2 * self.d_expert), (self.d_expert, self.d_model)

    def __str__(self) -> str:
        return self.model


MIXTURE = Mixture("granite-3.1-1b-a400m", 1024, 512, experts=32, top_k=8)
"""A small mixture, from its config."""

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's config: with random weights a training step costs what it costs with the real ones."""
