"""vLLM, as it is installed, serves adapters of ours: its answers are those of transformers with the same folder.

`make integrations` runs this in an environment of its own; vLLM's versions are not those of the other tests.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

# the engine in this process, which then can be looked into, on a processor, with a small cache and without reports
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
pytest.importorskip("vllm", reason="vLLM is not installed here: make integrations")

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, EngineArgs, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

import multiflora
from multiflora.errors import AdapterError
from multiflora.export.saved import open_adapter
from multiflora.integrations.vllm import ARCHITECTURE
from multiflora.integrations.vllm.branches import attach, places

SHARED = Path(os.environ.get("MULTIFLORA_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "models/tinylm-1m"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"needs the model in {SHARED}")

PROMPTS = [
    f"{start} {thing}"
    for start in ("The flower is", "Question: Which colour has", "In the morning,", "Theatre and", "She said that")
    for thing in (
        "the rose",
        "a",
        "in the United States, where",
        "the film of the year",
        "an old song",
        "\n",
        "1",
        "of",
    )
]
LENGTH = 16

EVERYWHERE = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ADAPTERS: dict[str, tuple[Any, str | None]] = {
    "rlora": (multiflora.RLoraConfig(num_heads=3, **EVERYWHERE), None),
    # one of the layers that vLLM computes as one, and a rank of its own
    "hydralora": (
        multiflora.HydraLoraConfig(
            num_heads=2, r=4, target_modules=["v_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 2}
        ),
        None,
    ),
    "loramoe": (multiflora.LoraMoeConfig(num_experts=3, **EVERYWHERE), None),
    "mtllora": (multiflora.MtlLoraConfig(num_heads=2, task_names=["colours", "seasons"], **EVERYWHERE), "seasons"),
    # one gate for all layers, which the first of them holds
    "moelora": (multiflora.MoeLoraConfig(num_experts=2, task_names=["colours", "seasons"], **EVERYWHERE), "seasons"),
}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def save(config: Any, folder: Path) -> None:
    """Save an adapter whose branches are far from zero, each part in the size that it has after a training."""
    torch.manual_seed(0)
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5
    model.save_pretrained(folder)


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
    return {
        "model": str(MODEL),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        # so that prompts are read in chunks, beside answers that run
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
        "hf_overrides": overrides,
    } | more


@contextmanager
def engine(**words: Any) -> Iterator[LLM]:
    made = LLM(**words)
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def of_vllm(made: LLM) -> list[str]:
    answers = made.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=LENGTH), use_tqdm=False)
    return [whole(answer.outputs[0].text) for answer in answers]


def of_transformers(model: Any, task: str | None = None) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = "<|pad|>"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with nullcontext() if task is None else multiflora.task(model, task):
        ids = model.eval().generate(**batch, do_sample=False, max_new_tokens=LENGTH)
    return [whole(text) for text in tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], True)]


def whole(text: str) -> str:
    """A text without the character whose bytes are not all there yet, which vLLM holds back."""
    return text.rstrip("�")


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the command itself does not start where vLLM was installed as vllm-cpu
    words = ["--model", MODEL, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 128]
    words += ["--hf-overrides.architectures+", ARCHITECTURE, "--hf-overrides.multiflora.adapter", folders["mtllora"]]
    words += ["--hf-overrides.multiflora.task", "seasons"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
    env = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        asked = {"model": "tiny", "prompt": PROMPTS, "max_tokens": LENGTH, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with asked_once_it_listens(request, server) as answer:
            answers = [whole(choice["text"]) for choice in json.load(answer)["choices"]]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    model = AutoModelForCausalLM.from_pretrained(folders["mtllora"], dtype=torch.float32)
    assert answers == of_transformers(model, "seasons")


def asked_once_it_listens(request: urllib.request.Request, server: subprocess.Popen[str]) -> Any:
    """Ask a server that has said that it is ready, and listens a moment later."""
    while True:
        try:
            return urllib.request.urlopen(request)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or server.poll() is not None:
                raise


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_branches_stand_beside_layers_that_keep_their_names(folders: dict[str, Path]) -> None:
    with engine(**settings(folders["hydralora"])) as made:
        model = made.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert type(model).__name__ == "LlamaForCausalLM"
        found = places(model)
        layer, start, stop = found["model.layers.0.self_attn.v_proj"]
        assert layer is found["model.layers.0.self_attn.qkv_proj"].layer
        assert (start, stop) == (128 + 64, 128 + 64 + 64)
        assert "model.layers.0.self_attn.qkv_proj.weight" in dict(model.named_parameters())
        other = shutil.copytree(folders["hydralora"], folders["hydralora"].parent / "other")
        rename(other, "layers.0.mlp.up_proj", "layers.9.mlp.up_proj")
        with pytest.raises(AdapterError, match=r"layers.9.mlp.up_proj, which is no linear layer of vLLM's LlamaFor"):
            attach(model, open_adapter(other), None, torch.float32)


def rename(folder: Path, before: str, after: str) -> None:
    """Rename the tensors of a saved adapter."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name.replace(before, after): tensor for name, tensor in load_file(file).items()}, file)


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
