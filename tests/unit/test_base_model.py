"""The base model's files are data, and its code runs only where the recipe asks for it, aloud."""

from __future__ import annotations

import logging

import pytest
import torch
from cli.parts import save_model
from safetensors.torch import load_file

from multiflora.base_model import load_model, load_tokenizer
from multiflora.errors import ConfigError, ExportError
from multiflora.export.source import load_base
from multiflora.recipe import ModelSpec


def test_weights_in_a_pickle_are_not_read(tmp_path):
    folder = save_model(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no causal language model could be loaded from the folder .*safetensors"):
        load_model(ModelSpec(name=str(folder)), torch.float32)
    with pytest.raises(ExportError, match=r"No base model could be loaded from .*safetensors"):
        load_base(str(folder))


def test_code_that_comes_with_a_model_is_said_aloud(tmp_path, caplog):
    folder = str(save_model(tmp_path / "model"))
    with caplog.at_level(logging.WARNING, logger="multiflora"):
        load_tokenizer(ModelSpec(name=folder))
        assert not caplog.records
        load_tokenizer(ModelSpec(name=folder, trust_remote_code=True))
    assert "Python code that comes with" in caplog.text
    assert folder in caplog.text
