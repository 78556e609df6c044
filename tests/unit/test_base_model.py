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
    with pytest.raises(ConfigError, match=r"No causal language model could be loaded from .*safetensors"):
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


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": 1, "added_tokens": null}'),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", '{"model_max_length": {"a": 1}, "eos_token": "</s>"}'),
        ("tokenizer_config.json", '{"eos_token": [1]}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_a_sentence(tmp_path, file, text):
    folder = save_model(tmp_path / "model")
    folder.joinpath(file).write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"No tokenizer could be loaded from .*model'"):
        load_tokenizer(ModelSpec(name=str(folder)))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model_type": 1}', '{"model_type": "gpt2", "n_embd": "x"}', '{"model_type": "no"}']
)
def test_a_damaged_config_is_a_sentence(tmp_path, text):
    folder = save_model(tmp_path / "model")
    folder.joinpath("config.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"No causal language model could be loaded from .*model'"):
        load_model(ModelSpec(name=str(folder)), torch.float32)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("./absent", "there is no such folder. Give"),
        ("a/b/c", "there is no such folder. Give"),
        ("a b", "there is no such folder. Give"),
        ("nobody/nothing", "there is no such folder, and as a model of the hub: it is not in the cache, and the hub"),
        ("file", "it is a file; expected a folder. Give"),
        (".", "the folder holds no config.json, but file. Give"),
    ],
)
def test_where_nothing_can_be_loaded_from_is_said(tmp_path, monkeypatch, name, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"No tokenizer could be loaded from '.*{name.strip('.')}': {why}"):
        load_tokenizer(ModelSpec(name=name))
