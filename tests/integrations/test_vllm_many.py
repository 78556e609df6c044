"""vLLM, as it is installed, serves adapters of ours beside others: each request of a batch is answered by its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make integrations")

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm.config import CompilationMode
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest

import multiflora
from multiflora import ops
from multiflora.errors import MultifloraError
from multiflora.integrations.vllm.branches import Slice
from multiflora.integrations.vllm.many import Batch, RoutedAdapter, Sum, named
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
    running,
    save,
    server,
)

pytestmark = needs_model

TASKS = ("colours", "seasons")
PATTERNS = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True}
"""What vLLM heeds in a plain LoRA, says docs/serving.md."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("vllm") / name for name in (*ADAPTERS, "plain")}
    for name in ADAPTERS:
        save(ADAPTERS[name][0], made[name])
    save(LoraConfig(**EVERYWHERE, **PATTERNS), made["plain"])
    return made


@pytest.fixture(scope="module")
def paths(folders: dict[str, Path]) -> dict[str, str]:
    """Every name that is served, and the path behind it."""
    found = {}
    for name, folder in folders.items():
        by_task = name in ADAPTERS and ADAPTERS[name][1] is not None
        found |= {f"{name}#{task}": f"{folder}#{task}" for task in TASKS} if by_task else {name: str(folder)}
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], paths: dict[str, str]) -> dict[str, list[str]]:
    """What transformers answers with each."""
    found = {"base": of_transformers(base())}
    for served in paths:
        name, _, task = served.partition("#")
        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        found[served] = of_transformers(model, task or None)
    for prompt, answers in zip(PROMPTS, zip(*found.values(), strict=True), strict=True):
        assert len(set(answers)) > len(found) // 2, f"adapters answer {prompt!r} alike, and would not be told apart"
    return found


@pytest.fixture(scope="module")
def made(paths: dict[str, str]) -> Iterator[LLM]:
    with engine(**LIMITS, enable_lora=True, max_loras=len(paths), max_lora_rank=8) as one:
        yield one


def request(paths: dict[str, str], name: str) -> LoRARequest | None:
    return LoRARequest(name, 1 + list(paths).index(name), paths[name]) if name in paths else None


def asked_together(made: LLM, paths: dict[str, str], names: list[str], prompts: list[str]) -> dict[str, list[str]]:
    """Every prompt to each, side by side in the same batches."""
    each = [(name, prompt) for prompt in prompts for name in names]
    answers = of_vllm(made, [prompt for _, prompt in each], [request(paths, name) for name, _ in each])
    found: dict[str, list[str]] = {name: [] for name in names}
    for (name, _), answer in zip(each, answers, strict=True):
        found[name].append(answer)
    return found


# ---- answers --------------------------------------------------------------------------------------------------------


def test_each_request_of_a_batch_has_its_own_adapter(
    made: LLM, paths: dict[str, str], expected: dict[str, list[str]]
) -> None:
    assert asked_together(made, paths, list(expected), PROMPTS) == expected


def test_answers_are_those_of_our_own_server(folders: dict[str, Path], expected: dict[str, list[str]]) -> None:
    words = ["-m", "multiflora", "serve", MODEL, *(f"{name}={folder}" for name, folder in folders.items())]
    with running([*words, "--name", "base", "--port", 0, "--dtype", "float32"], "Serving ") as line:
        address = next(word for word in line.split() if word.startswith("http://")).removesuffix("/v1")
        for served, answers in expected.items():
            name, _, task = served.partition("#")
            assert ask(address, name, **({"task": task} if task else {})) == answers


def test_a_server_is_told_by_lora_modules(paths: dict[str, str], expected: dict[str, list[str]]) -> None:
    words = ["--model", MODEL, "--served-model-name", "base", "--dtype", "float32", "--max-model-len", 128]
    served = ("rlora", "mtllora#seasons", "plain")
    words += ["--enable-lora", "--max-loras", 3, "--lora-modules", *(f"{name}={paths[name]}" for name in served)]
    with server(*words) as address:
        for name in ("base", *served):
            assert ask(address, name) == expected[name]


# ---- which tokens are whose -----------------------------------------------------------------------------------------


def test_tokens_of_a_batch_are_told_apart() -> None:
    first, second = RoutedAdapter(1, {}), RoutedAdapter(2, {})
    kept = {1: first, 2: second, 3: "vLLM's own"}
    batch, ids = Batch(), [1, 1, 0, 2, 3, 0, 2, 3]
    batch.take(ids, kept.get, torch.device("cpu"))
    tokens = torch.arange(len(ids))
    assert [(one, tokens[own].tolist()) for one, own in batch.ours] == [(first, [0, 1]), (second, [3, 6])]
    assert batch.theirs
    assert tokens[batch.others].tolist() == [0, 1, 2, 3, 5, 6]
    batch.take([0, 0], kept.get, torch.device("cpu"))
    assert not batch.ours
    assert not batch.theirs


def test_a_layer_adds_to_each_token_its_own_adapter_and_nothing_else() -> None:
    d_in, sizes, heads, rank, name = 6, (3, 5), 2, 2, "layer"
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    routed = ops.Prepared(drawn(rank + heads, d_in), drawn(heads * rank, 3), heads, rank, routed=True, top_k=0)
    gated = ops.Prepared(drawn(rank, d_in), drawn(rank, 5), 1, rank, routed=False, top_k=0)
    first = RoutedAdapter(1, {name: [Slice(0, 3, routed), Slice(3, 8, gated)]})
    elsewhere = RoutedAdapter(2, {"another layer": [Slice(0, 3, routed)]})
    # vLLM's own in the last place, whose matrices it gives on processors to tokens that have none
    A, B = [torch.zeros(3, 1, 4, d_in)] * 2, [torch.zeros(3, 1, size, 4) for size in sizes]
    A[0][2], B[0][2], B[1][2] = drawn(1, 4, d_in), drawn(1, 3, 4), drawn(1, 5, 4)
    ids = (1, 3, 0, 1, 2, 0, 3, 1)
    theirs, batch = PunicaWrapperCPU(16, 8, "cpu"), Batch()
    theirs.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1, 2, 3], 4, 100)
    batch.take(ids, {1: first, 2: elsewhere, 3: "vLLM's own"}.get, torch.device("cpu"))
    x, y = drawn(len(ids), d_in), drawn(len(ids), sum(sizes))
    expected = y.clone()
    for token, number in enumerate(ids):
        if number == 1:
            stem, logits = (routed.rows @ x[token]).split((rank, heads))
            for head, weight in enumerate(logits.softmax(0)):
                expected[token, :3] += weight * stem @ routed.columns[head * rank : (head + 1) * rank]
            expected[token, 3:] += gated.rows @ x[token] @ gated.columns
        elif number == 3:
            for own, b in ((slice(0, 3), B[0]), (slice(3, 8), B[1])):
                expected[token, own] += b[2, 0].double() @ (A[0][2, 0].double() @ x[token])
    Sum(theirs, name, batch).add_lora_linear(y, x, tuple(A), tuple(B), 1.0, sizes)
    ours = torch.tensor([number != 3 for number in ids])
    torch.testing.assert_close(y[ours], expected[ours], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # theirs goes by way of float32


def test_what_a_path_names(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = folders["rlora"]
    assert named(str(ours)) == (ours, None)
    assert named(f"{ours}#seasons") == (ours, "seasons")
    with_mark = shutil.copytree(ours, tmp_path / "run#1")
    assert named(str(with_mark)) == (with_mark, None)
    assert named(f"{with_mark}#seasons") == (with_mark, "seasons")
    # these are vLLM's own to load, or to refuse
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("{")
    for path in (folders["plain"], tmp_path / "absent", tmp_path / "broken", "someone/adapter"):
        assert named(str(path)) is None


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(made: LLM, path: Path | str, words: str) -> None:
    with pytest.raises(MultifloraError, match=words):
        made.llm_engine.add_lora(LoRARequest("refused", 99, str(path)))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("mtllora", r"none is named; its tasks are colours, seasons. Name it after the folder: .*mtllora#TASK"),
        ("mtllora#moods", "has no task 'moods'; its tasks are colours, seasons"),
        ("rlora#colours", "has no task 'colours'"),
        ("more", "holds .*norm.*, which belongs to no linear layer"),
        ("wide", r"gate_proj.* layer of the base model is 336 x 128. The adapter was trained on another model"),
        ("cut", r"adapter_model.safetensors"),
    ],
)
def test_adapters_that_vllm_cannot_serve(
    path: str, words: str, made: LLM, folders: dict[str, Path], tmp_path: Path
) -> None:
    name, mark, task = path.partition("#")
    folder = folders.get(name, tmp_path / name)
    if name == "more":
        save(multiflora.RLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]), folder)
    elif name not in folders:
        shutil.copytree(folders["rlora"], folder)
        if name == "wide":
            rename(folder, "self_attn.q_proj", "self_attn.swap")
            rename(folder, "mlp.gate_proj", "self_attn.q_proj")
            rename(folder, "self_attn.swap", "mlp.gate_proj")
        else:
            weights = folder / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
    refused(made, f"{folder}{mark}{task}", words)


def test_settings_of_vllm_that_do_not_go_with_an_adapter(
    made: LLM, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made.llm_engine.vllm_config
    for place, name, value, words in (
        (config.compilation_config, "mode", CompilationMode.VLLM_COMPILE, "Add --enforce-eager"),
        (config.lora_config, "fully_sharded_loras", True, "--fully-sharded-loras is given"),
        (config.parallel_config, "tensor_parallel_size", 2, "--tensor-parallel-size is 2"),
        (config.model_config, "quantization", "fp8", r"The base model is quantised \(fp8\)"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, value)
            refused(made, folders["rlora"], words)


def test_tasks_without_names_are_named_by_number(made: LLM, tmp_path: Path) -> None:
    save(multiflora.MtlLoraConfig(num_heads=2, num_tasks=2, **EVERYWHERE), tmp_path / "numbered")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "numbered", dtype=torch.float32)
    few = PROMPTS[:4]
    given = LoRARequest("numbered", 98, f"{tmp_path / 'numbered'}#1")
    assert of_vllm(made, few, [given] * 4) == of_transformers(model, 1)[:4]


# ---- one place, by an engine of its own, whose end takes what the engine above needs --------------------------------


@pytest.mark.parametrize("name", ["rlora", "plain"])
def test_adapters_take_turns_in_one_place_and_leave_the_base_model_alone(
    name: str, paths: dict[str, str], expected: dict[str, list[str]]
) -> None:
    few = PROMPTS[:6]
    with engine(**LIMITS, enable_lora=True, max_loras=1, max_lora_rank=8) as one:
        for other in ("hydralora", name):
            found = asked_together(one, paths, ["base", other], few)
            assert found == {key: expected[key][:6] for key in found}
