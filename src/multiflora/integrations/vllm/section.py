"""What ``--hf-overrides`` says under ``multiflora``; and whether vLLM can serve an adapter, asked before loading."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from transformers import PreTrainedConfig

from multiflora.adapter_folder import WEIGHTS
from multiflora.adapter_tensors import CONFIG, misfits
from multiflora.base_model import empty_model
from multiflora.errors import AdapterError, ConfigError
from multiflora.export.saved import SavedAdapter, open_adapter
from multiflora.methods.base import task_list
from multiflora.schema import Strict, absolute, build
from multiflora.task_ids import index_of
from multiflora.tensor_file import TensorFile

__all__ = ["NAME_TASK", "Section", "base_architectures", "check", "check_adapter", "section_of", "task_of"]

_WHERE = "--hf-overrides, under multiflora"
_DIGEST = "multiflora_digest"
NAME_TASK = "Add --hf-overrides.multiflora.task TASK: one server, one task."
"""How to name the task of all requests."""


class Section(Strict):
    """What stands under ``multiflora``."""

    adapter: Annotated[Path, BeforeValidator(absolute)]
    """The folder an adapter was saved to."""
    task: str | int | None = None
    """The task of all requests, for methods gated by task."""


def section_of(hf_config: Any) -> Section:
    """The section of a base model's config.

    Raises:
        ConfigError: It is missing or has problems: all of them are listed.
    """
    given = getattr(hf_config, "multiflora", None)
    if given is None:
        raise ConfigError(
            "architectures names multiflora's, and no adapter is named; expected its folder. Add "
            "--hf-overrides.multiflora.adapter FOLDER."
        )
    return build(Section, given, where=_WHERE, base=Path.cwd())


def check(vllm_config: Any) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        ConfigError: Says which setting, and what to do.
        ExportError: The adapter's folder holds none of ours, or is damaged.
        AdapterError: The adapter has no such task, or was trained on another model.
    """
    model_config = vllm_config.model_config
    section = section_of(model_config.hf_config)
    adapter = open_adapter(section.adapter)
    task_of(adapter, section.task, NAME_TASK)
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "--enable-lora is given; vLLM's own LoRA layers would pass multiflora's branches by. Leave it out; or "
            "leave --hf-overrides out and name the folder in --lora-modules, beside as many others as you like."
        )
    check_adapter(vllm_config, adapter)
    # vLLM keeps compiled code by what the config says: an adapter of other shapes in the same folder is another model
    found = hashlib.sha256((section.adapter / CONFIG).read_bytes()).hexdigest()
    setattr(model_config.hf_config, _DIGEST, found)


def check_adapter(vllm_config: Any, adapter: SavedAdapter) -> None:
    """Refuse an adapter that cannot be served beside this base model with these settings.

    Raises:
        ConfigError: Says which setting, and what to do.
        AdapterError: The adapter was trained on another model.
    """
    model_config = vllm_config.model_config
    for problem in _problems(vllm_config, adapter):
        raise ConfigError(problem)
    base = empty_model(copy.deepcopy(model_config.hf_config), remote=model_config.trust_remote_code)
    with TensorFile(adapter.folder / WEIGHTS) as file:
        for problem in misfits(adapter.config, file, base):
            raise AdapterError(f"{file.path}: {problem}")


def _problems(vllm_config: Any, adapter: SavedAdapter) -> Iterator[str]:
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    for flag, size in (
        ("--tensor-parallel-size", parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
    ):
        if size > 1:
            yield (
                f"{flag} is {size}; a multiflora adapter is served by one process that has the whole model. Leave it "
                "out."
            )
    if model_config.quantization is not None:
        yield (
            f"The base model is quantised ({model_config.quantization}); vLLM serves multiflora adapters on base "
            "models in float32, float16 or bfloat16. Give the model as it was before, or use `multiflora serve`."
        )
    if adapter.others:
        yield (
            f"{adapter.folder} holds {adapter.others[0]}, which belongs to no linear layer; vLLM is given branches "
            "alone. Use `multiflora serve`, which serves what else an adapter has learned."
        )
    if getattr(adapter.config, "router_per", "layer") != "layer":
        yield (
            f"{adapter.folder} has one router for each feed-forward block (router_per='block'), and what hangs on one "
            "of vLLM's layers knows nothing of another. Use `multiflora serve`."
        )
    names = base_architectures(model_config)
    info, _ = model_config.registry.inspect_model_cls(names, model_config)
    kinds = ("supports_multimodal", "has_inner_state", "is_hybrid", "is_attention_free")
    kind = next((kind for kind in kinds if getattr(info, kind)), None)
    if kind is not None or model_config.use_mla or not info.is_text_generation_model:
        yield (
            f"{model_config.model} is a {names[0]} ({kind or 'latent attention'}); vLLM serves multiflora adapters on "
            "models of text with ordinary attention. Use `multiflora serve`."
        )


def task_of(adapter: SavedAdapter, task: str | int | None, how: str) -> int | None:
    """Index of the task of an adapter's requests; None where none was named and none is needed.

    Args:
        adapter: The adapter.
        task: The task that was named.
        how: How to name one, a sentence.

    Raises:
        ConfigError: One is needed.
        AdapterError: The adapter has no such task.
    """
    if task is not None:
        return index_of(adapter.config, task)
    if not adapter.method.needs_task():
        return None
    if adapter.config.num_tasks == 1:
        return 0
    raise ConfigError(
        f"{adapter.folder} holds a {adapter.method.name} adapter, whose answers depend on the task, and none is named; "
        f"its tasks are {task_list(adapter.config)}. {how}"
    )


def base_architectures(model_config: Any) -> list[str]:
    """What the base model's own config says of its architecture, which ours has replaced.

    Raises:
        ConfigError: It says nothing.
    """
    words, _ = PreTrainedConfig.get_config_dict(
        model_config.hf_config_path or model_config.model, revision=model_config.revision
    )
    names = words.get("architectures")
    if not names:
        raise ConfigError(
            f'{model_config.model}: config.json names no architectures; expected e.g. ["LlamaForCausalLM"]. Add them.'
        )
    return [str(name) for name in names]
