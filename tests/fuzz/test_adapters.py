"""Tampered adapters of every method: refused with the tensor, the file or the setting that is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from made_adapters import OURS, adapted, save
from safetensors.torch import load_file, save_file

from multiflora.adapter_folder import load_adapter

from .conftest import World, fuzz
from .junk import changed, numbers, odd_text, spoiled

EACH = 60
KINDS = ["lora", *OURS]
SETTINGS = {"moelora": {"num_experts": 2}}
FILES = ("adapter_config.json", "adapter_model.safetensors")


@st.composite
def tampered_weights(
    draw: Any, tensors: dict[str, torch.Tensor], foreign: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A tensor of another shape, type or name, one too many or too few, or numbers that are none."""
    held, name = dict(tensors), draw(st.sampled_from(sorted(tensors)))
    tensor = held[name]
    kind = draw(st.sampled_from(["shape", "type", "name", "less", "more", "numbers", "turned", "foreign", "empty"]))
    if kind == "shape":
        held[name] = torch.zeros(draw(st.lists(st.integers(1, 70), max_size=3)))
    elif kind == "type":
        held[name] = tensor.to(draw(st.sampled_from([torch.int64, torch.bool, torch.uint8, torch.complex64])))
    elif kind == "name":
        held[draw(st.text("abAB._019/", min_size=1, max_size=30))] = held.pop(name)
    elif kind == "less":
        del held[name]
    elif kind == "more":
        held[name + draw(st.sampled_from(["2", ".weight", ".more"]))] = tensor.clone()
    elif kind == "numbers":
        broken = tensor.clone()
        broken.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(
            st.sampled_from([float("nan"), float("inf"), -float("inf")])
        )
        held[name] = broken
    elif kind == "turned":
        held[name] = (
            tensor.t().contiguous() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] else tensor[:1].clone()
        )
    elif kind == "foreign":
        held.update(dict(draw(st.sampled_from([list(foreign.items())[:1], list(foreign.items())]))))
    else:
        held[name] = torch.zeros(0, 4)
    return held


@st.composite
def lying_header(draw: Any, good: bytes) -> bytes:
    """A safetensors file whose header promises something else than its bytes hold."""
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    name = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "length", "whole"]))
    if part == "length":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, 2**40, 2**63, length - 1, length + 9]))) + good[8:]
    if part == "whole":
        header[name] = draw(st.one_of(odd_text, numbers))
    elif part == "dtype":
        header[name]["dtype"] = draw(st.sampled_from(["F64", "F8_E4M3", "I8", "X", "", 3]))
    elif part == "shape":
        header[name]["shape"] = draw(
            st.sampled_from([[10**9, 10**9], [2**62, 4], [-1], [], [0], ["a"], [1.5], [10**30]])
        )
    else:
        header[name]["data_offsets"] = draw(st.sampled_from([[0, 10**12], [10**12, 0], [-4, 4], [0, 0], [0], "x"]))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + good[8 + length :]


@pytest.mark.parametrize("kind", KINDS)
def test_tampered_adapters(world: World, tiny_llama: Callable[..., Any], kind: str) -> None:
    words = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    good = save(adapted(kind, tiny_llama(**words), r=2, **SETTINGS.get(kind, {})), world.root / "good")
    other = "lora" if kind == "hydralora" else "hydralora"
    foreign = load_file(save(adapted(other, tiny_llama(**words), r=2), world.root / "foreign") / FILES[1])
    config, weights = ((good / name).read_bytes() for name in FILES)
    tensors, base = load_file(good / FILES[1]), tiny_llama(**words)
    settings = json.loads(config)
    named = {key: value for key, value in settings.items() if value is not None}
    examples = st.one_of(
        tampered_weights(tensors, foreign),
        lying_header(weights),
        spoiled(weights[: len(weights) // 8]),
        st.one_of(changed([named]).map(json.dumps), spoiled(config).map(lambda b: b.decode("latin-1"))),
    )

    def write(example: Any) -> None:
        folder = world.work / "fuzzed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if isinstance(example, dict):
            save_file(example, folder / FILES[1])
        elif isinstance(example, bytes):
            (folder / FILES[1]).write_bytes(example)
        else:
            (folder / FILES[0]).write_bytes(example.encode("latin-1", "backslashreplace"))

    def read() -> None:
        from multiflora.base_model import share_weights

        load_adapter(share_weights(base), Path("fuzzed"))

    fuzz(world, examples, EACH, write, read, tries=1.75)
