"""vLLM, as it is installed, serves adapters of ours: its answers are those of transformers with the same folder.

`make integrations` runs this in an environment of its own; vLLM's versions are not those of the other tests.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make integrations")

import torch
from transformers import AutoModelForCausalLM
from vllm import EngineArgs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.utils import get_packed_modules_mapping

import multiflora
from multiflora.errors import AdapterError
from multiflora.export.saved import open_adapter
from multiflora.integrations.vllm import ARCHITECTURE
from multiflora.integrations.vllm.branches import attach, places
from tests.integrations.vllm_engines import (
    ADAPTERS,
    EVERYWHERE,
    LIMITS,
    MODEL,
    PROMPTS,
    ask,
    base,
    engine,
    needs_model,
    of_transformers,
    of_vllm,
    rename,
    save,
    server,
)

pytestmark = needs_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("vllm") / name for name in ADAPTERS}
    for name, folder in made.items():
        save(ADAPTERS[name][0], folder)
    return made


def settings(adapter: Path, task: str | None = None, **more: Any) -> dict[str, Any]:
    """What vLLM is told."""
    section = {"adapter": str(adapter)} | ({} if task is None else {"task": task})
    overrides = {"architectures": [ARCHITECTURE], "multiflora": section}
    return LIMITS | {"hf_overrides": overrides} | more


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_answers_are_those_of_transformers_with_the_same_folder(name: str, folders: dict[str, Path]) -> None:
    task = ADAPTERS[name][1]
    with engine(**settings(folders[name], task)) as made:
        answers = of_vllm(made)
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    assert answers == of_transformers(model, task)
    assert sum(own != other for own, other in zip(answers, of_transformers(base()), strict=True)) > len(PROMPTS) // 2
    if task is not None:
        assert answers != of_transformers(model, "colours")


@pytest.mark.slow
def test_compiled_answers_are_the_same(folders: dict[str, Path]) -> None:
    with engine(**settings(folders["rlora"], enforce_eager=False)) as made:
        answers = of_vllm(made)
    assert answers == of_transformers(AutoModelForCausalLM.from_pretrained(folders["rlora"], dtype=torch.float32))


def test_a_server_finds_the_plugin_by_itself(folders: dict[str, Path]) -> None:
    words = ["--model", MODEL, "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", 128, "--hf-overrides.architectures+", ARCHITECTURE]
    words += ["--hf-overrides.multiflora.adapter", folders["mtllora"], "--hf-overrides.multiflora.task", "seasons"]
    with server(*words) as address:
        answers = ask(address, "tiny")
    model = AutoModelForCausalLM.from_pretrained(folders["mtllora"], dtype=torch.float32)
    assert answers == of_transformers(model, "seasons")


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_branches_stand_beside_layers_that_keep_their_names(folders: dict[str, Path]) -> None:
    with engine(**settings(folders["hydralora"])) as made:
        model = made.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert type(model).__name__ == "LlamaForCausalLM"
        found = places(dict(model.named_modules()), get_packed_modules_mapping(model))
        name, layer, start, stop = found["model.layers.0.self_attn.v_proj"]
        assert name == "model.layers.0.self_attn.qkv_proj"
        assert layer is found[name].layer
        assert (start, stop) == (128 + 64, 128 + 64 + 64)
        assert "model.layers.0.self_attn.qkv_proj.weight" in dict(model.named_parameters())
        other = shutil.copytree(folders["hydralora"], folders["hydralora"].parent / "other")
        rename(other, "layers.0.mlp.up_proj", "layers.9.mlp.up_proj")
        with pytest.raises(AdapterError, match=r"layers.9.mlp.up_proj, which is no linear layer of vLLM's LlamaFor"):
            attach(model, open_adapter(other), None, torch.float32)


# ---- what is refused, before an engine is started -------------------------------------------------------------------


def refused(words: str, **given: Any) -> None:
    with pytest.raises(ValueError, match=words):
        EngineArgs(**given).create_engine_config()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is 2; a multiflora adapter is served by one process"),
        ({"enable_lora": True}, "--enable-lora is given; vLLM's own LoRA layers"),
        ({"quantization": "fp8"}, r"The base model is quantised \(fp8\)"),
    ],
)
def test_settings_of_vllm_that_do_not_go_with_an_adapter(
    more: dict[str, Any], words: str, folders: dict[str, Path]
) -> None:
    refused(words, **settings(folders["rlora"], **more))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (None, r"no adapter is named; expected its folder. Add --hf-overrides.multiflora.adapter FOLDER"),
        ({}, "under multiflora: adapter is missing"),
        ({"adapter": "rlora", "tasks": "a"}, "tasks is not a known key"),
        ({"adapter": "absent"}, "absent does not exist"),
        ({"adapter": "mtllora"}, "whose answers depend on the task, and none is named; its tasks are colours, seasons"),
        ({"adapter": "mtllora", "task": "moods"}, "has no task 'moods'; its tasks are colours, seasons"),
        ({"adapter": "rlora", "task": "colours"}, "has no task 'colours'"),
        ({"adapter": "lora"}, "holds an adapter of kind LORA; expected one of"),
        ({"adapter": "newer"}, "peft_type is 'MF_RLORA_2', which is not a kind of adapter; did you mean MF_RLORA"),
        (
            {"adapter": "wide"},
            r"gate_proj.* layer of the base model is 336 x 128. The adapter was trained on another model",
        ),
        ({"adapter": "more"}, "holds .*norm.*, which belongs to no linear layer"),
    ],
)
def test_adapters_that_vllm_cannot_serve(
    section: dict[str, Any] | None, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = folders | {name: tmp_path / name for name in ("absent", "lora", "newer", "wide", "more")}
    asked = None if section is None else section.get("adapter")
    if asked == "lora":
        from peft import LoraConfig

        save(LoraConfig(**EVERYWHERE), made["lora"])
    elif asked == "newer":
        shutil.copytree(folders["rlora"], made["newer"])
        file = made["newer"] / "adapter_config.json"
        file.write_text(file.read_text().replace('"MF_RLORA"', '"MF_RLORA_2"'))
    elif asked == "wide":
        shutil.copytree(folders["rlora"], made["wide"])
        rename(made["wide"], "self_attn.q_proj", "self_attn.swap")
        rename(made["wide"], "mlp.gate_proj", "self_attn.q_proj")
        rename(made["wide"], "self_attn.swap", "mlp.gate_proj")
    elif asked == "more":
        save(multiflora.RLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]), made["more"])
    given = settings(folders["rlora"])
    del given["hf_overrides"]["multiflora"]
    if section is not None:
        given["hf_overrides"]["multiflora"] = section | ({"adapter": str(made[asked])} if asked else {})
    refused(words, **given)


def test_compiled_code_is_kept_by_the_adapter_that_it_was_made_for(tmp_path: Path) -> None:
    hashes = set()
    for rank in (4, 6):
        save(multiflora.RLoraConfig(r=rank, target_modules=["q_proj"]), tmp_path / "adapter")
        config = EngineArgs(**settings(tmp_path / "adapter")).create_engine_config()
        hashes.add(config.compute_hash())
    assert len(hashes) == 2


def test_the_base_model_s_class_is_asked_as_without_us(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Asked(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            asked.append(vllm_config.model_config.model)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            asked.append(model_config.model)

    monkeypatch.setitem(MODELS_CONFIG_MAP, "LlamaForCausalLM", Asked)
    EngineArgs(**settings(folders["rlora"])).create_engine_config()
    assert asked == [str(MODEL)] * 2
