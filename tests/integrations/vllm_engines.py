"""What the tests of vLLM share: adapters, an engine in this process, a server in another, what transformers answers."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
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
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import multiflora

SHARED = Path(os.environ.get("MULTIFLORA_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "models/tinylm-1m"

needs_model = pytest.mark.skipif(not MODEL.is_dir(), reason=f"needs the model in {SHARED}")

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


LIMITS = {
    "model": str(MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    # so that prompts are read in chunks, beside answers that run
    "max_num_batched_tokens": 16,
    "max_num_seqs": 8,
}
"""What vLLM is told in all tests."""


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


def rename(folder: Path, before: str, after: str) -> None:
    """Rename the tensors of a saved adapter."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name.replace(before, after): tensor for name, tensor in load_file(file).items()}, file)


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


def of_vllm(made: LLM, prompts: Sequence[str] = PROMPTS, lora_request: Any = None) -> list[str]:
    greedy = SamplingParams(temperature=0, max_tokens=LENGTH)
    answers = made.generate(prompts, greedy, lora_request=lora_request, use_tqdm=False)
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


@contextmanager
def server(*words: Any) -> Iterator[str]:
    """vLLM's server in a process of its own, as its command starts it; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the command itself does not start where vLLM was installed as vllm-cpu
    given = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port, *words]
    with running(given, "Application startup complete"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(words: Sequence[Any], ready: str) -> Iterator[str]:
    """A module in a process of its own; gives the line in which it says that it is ready."""
    env = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    started = subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert started.stdout is not None
        said = []
        for line in started.stdout:
            said.append(line)
            if ready in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        yield line
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def ask(address: str, model: str, **more: Any) -> list[str]:
    """The answers of an OpenAI-compatible server to all prompts."""
    asked = {"model": model, "prompt": PROMPTS, "max_tokens": LENGTH, "temperature": 0} | more
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with once_it_listens(request) as answer:
        return [whole(choice["text"]) for choice in json.load(answer)["choices"]]


def once_it_listens(request: urllib.request.Request) -> Any:
    """Ask a server that has said that it is ready, and listens a moment later."""
    while True:
        try:
            return urllib.request.urlopen(request)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
