"""Settings of every method, of any type and size: refused by name, or an adapter that can be built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from multiflora.base_model import empty_model
from multiflora.methods import METHODS, settings_of
from multiflora.recipe import load_recipe
from multiflora.training.adapter import adapter_config, add_adapter

from .conftest import World, fuzz
from .junk import PATTERNS, large, numbers, odd

EACH = 24
KINDS = [name for name, card in METHODS.items() if card.config or card.training]
MEANT = st.one_of(
    st.integers(1, 4),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["none", "all", "zero", "token", "task", "q_proj", "all-linear", *PATTERNS]),
    st.lists(st.sampled_from(["q_proj", "lm_head", "embed_tokens", "no_such"]), max_size=2),
    st.dictionaries(st.sampled_from(["q_proj", "layers.0", *PATTERNS]), numbers, max_size=2),
)


@pytest.mark.parametrize("kind", KINDS)
def test_settings(world: World, tiny_llama: Callable[..., Any], kind: str) -> None:
    config = tiny_llama(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=1).config
    value = st.one_of(odd, MEANT, MEANT, numbers, large)
    settings = st.dictionaries(st.sampled_from(sorted(settings_of(kind))), value, min_size=1, max_size=3)

    def write(example: Any) -> None:
        given, tied = example
        config.tie_word_embeddings = tied
        recipe = {"model": "x/y", "method": {"name": kind, **given}, "tasks": ["boolq", "rte"], "output": "out"}
        Path("fuzzed.yaml").write_bytes(json.dumps(recipe).encode())

    def read() -> None:
        recipe = load_recipe("fuzzed.yaml")
        adapter_config(recipe)
        add_adapter(empty_model(config), recipe, low_cpu_mem_usage=True)

    fuzz(world, st.tuples(settings, st.booleans()), EACH, write, read, tries=1.4)
