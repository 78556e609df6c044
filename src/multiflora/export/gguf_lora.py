"""A llama.cpp adapter (GGUF) from a plain LoRA. It goes beside a GGUF of the base model: ``llama-server --lora FILE``.

llama.cpp multiplies every layer's B A by alpha / (the layer's rank), alpha being one number for the file; here alpha is
the largest rank and what that makes of smaller ones is taken out of their B. Llama's own q and k projections are stored
by llama.cpp in another order of rows (rotary pairs side by side), so the rows of their B are put in that order too.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multiflora.errors import EnvironmentProblem, ExportError
from multiflora.export.convert import to_lora
from multiflora.export.plain import Pair, read_lora
from multiflora.export.report import AdapterReport, Report
from multiflora.export.same import base_or_warning, check_logits, logits_of, with_pairs
from multiflora.export.source import base_name
from multiflora.export.stage import staged
from multiflora.files import user_path, write_json

__all__ = ["ARCHITECTURES", "interleave", "requests", "server_options", "to_gguf"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp stores a family of models."""

    name: str
    """Its word for the family."""
    interleaved: bool = False
    """Whether it stores the rows of q and k in the order of rotary pairs."""


ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture("llama", interleaved=True),
    "mistral": _Architecture("llama", interleaved=True),
    "smollm3": _Architecture("smollm3", interleaved=True),
    "granite": _Architecture("granite", interleaved=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "phi3": _Architecture("phi3"),
}
"""transformers' ``model_type`` -> llama.cpp's family: dense models whose linear layers it stores one by one."""


def to_gguf(adapter: str | Path, folder: str | Path, *, base: str | Path | None = None, **conversion: Any) -> Report:
    """Write an adapter for llama.cpp: one ``.gguf`` file, or one for each task, or for each expert.

    Where there are several, ``llama-server.json`` beside them has the words that load them all into one llama-server,
    and for each task what a request says to be of that task.

    Args:
        adapter: The folder an adapter was saved to.
        folder: Where the files go; it must not hold anything yet.
        base: The base model's folder or hub id, where the adapter names none. Its config says how llama.cpp stores it;
            its weights are read to compare logits, where they are at hand.
        conversion: ``task``, ``per_expert``, ``calibration``, ``fit``, ``rank``, ... as for `multiflora.to_lora`.

    Raises:
        ExportError: llama.cpp stores this model family in a form that a LoRA here cannot be put into, or the check of
            the result failed.
        EnvironmentProblem: The package ``gguf`` is not installed.

    Example:
        >>> to_gguf("runs/mlora", "runs/mlora-gguf")  # doctest: +SKIP
    """
    source, output = user_path(adapter), user_path(folder)
    model_config = _model_config(base_name(source, base))
    with staged(output) as place, tempfile.TemporaryDirectory() as scratch:
        model = base_or_warning(source, base, "The GGUF adapter")
        report = to_lora(source, Path(scratch) / "lora", base=base, **conversion)
        for made in report.adapters:
            lora = read_lora(Path(scratch) / "lora" / made.folder)
            # peft saves the base weight of an adapted output layer, too: it is in the base's GGUF already
            others = [name for name in lora.others if not name.endswith(".base_layer.weight")]
            if others:
                raise ExportError(
                    f"{source} holds {others[0]} besides its layers, which a llama.cpp adapter has no place for. Use "
                    "--to dense and llama.cpp's own convert_hf_to_gguf.py."
                )
            file, pairs = place / _file(made), list(lora.pairs())
            write_gguf(file, pairs, model_config)
            if model is not None:
                found = _logits(model, read_gguf(file, model_config, [name for name, _ in model.named_modules()]))
                check_logits(found, _logits(model, pairs), f"{file.name}, made from {source},")
        report = replace(report, output=output)
        write_json(place / "report.json", report.to_dict())
        if len(report.adapters) > 1:
            write_json(place / "llama-server.json", {"options": server_options(report), "lora": requests(report)})
    log.info("%d GGUF adapter(s) written to %s and read back", len(report.adapters), output)
    return report


def server_options(report: Report) -> list[str]:
    """What llama-server is started with, in the folder and beside its model, to have every adapter at hand."""
    # at scale 0 until a request says more: by --lora, one that names no adapter would get the sum of them all
    return [word for made in report.adapters for word in ("--lora-scaled", f"{_file(made)}:0")]


def requests(report: Report) -> dict[str, list[dict[str, float]]]:
    """The field ``lora`` of a request to that server, for each task: the adapters by number, and their scales."""
    if report.scales:
        return {
            task: [{"id": number, "scale": scale} for number, scale in enumerate(row)]
            for task, row in report.scales.items()
        }
    # an adapter that a request leaves out has scale 0 in it
    return {str(made.task): [{"id": number, "scale": 1.0}] for number, made in enumerate(report.adapters)}


def _file(made: AdapterReport) -> str:
    return f"{made.folder or 'adapter'}.gguf"


def _logits(model: Any, pairs: list[Pair]) -> Tensor:
    with with_pairs(model, pairs):
        return logits_of(model)


def _model_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ExportError(f"No config of the base model could be read from {name!r}; name it with --base.") from error
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"The base model is of type {config.model_type!r}; GGUF adapters can be written for "
            f"{', '.join(ARCHITECTURES)}. Use --to dense and llama.cpp's own convert_hf_to_gguf.py."
        )
    return config


def write_gguf(path: Path, pairs: list[Pair], model_config: Any) -> None:
    """Write one adapter file and read it back.

    Args:
        path: The file.
        pairs: Every layer's update, by its name in the transformers model.
        model_config: The base model's transformers config.
    """
    gguf = _gguf()
    family = ARCHITECTURES[model_config.model_type]
    alpha = float(max(pair.A.shape[0] for pair in pairs))
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for pair in pairs:
        rows = _reordered(pair, model_config) if family.interleaved else pair.B
        name = _stored_name(gguf, family.name, model_config.num_hidden_layers, pair.name)
        tensors[f"{name}.lora_a"] = pair.A.contiguous().numpy()
        tensors[f"{name}.lora_b"] = (rows * (pair.A.shape[0] / alpha)).contiguous().numpy()
    writer = gguf.GGUFWriter(str(path), family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(gguf, path, tensors)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentProblem("GGUF files need the package gguf: pip install 'multiflora[demo]'.") from error
    return gguf


def _stored_name(gguf: Any, family: str, blocks: int, name: str) -> str:
    """llama.cpp's name of a weight, such as blk.0.attn_q.weight."""
    kinds = {word: kind for kind, word in gguf.MODEL_ARCH_NAMES.items()}
    stored = gguf.get_tensor_name_map(kinds[family], blocks).get_name(f"{name}.weight", try_suffixes=(".weight",))
    if stored in (None, "token_embd.weight", "output.weight"):
        raise ExportError(
            f"llama.cpp cannot take an adapter of the layer {name} in a {family} model. Train without it, or use --to "
            "dense."
        )
    return str(stored)


def _reordered(pair: Pair, model_config: Any, *, back: bool = False) -> Tensor:
    layer = pair.name.rpartition(".")[2]
    if layer == "q_proj":
        return interleave(pair.B, model_config.num_attention_heads, back=back)
    if layer == "k_proj":
        return interleave(pair.B, model_config.num_key_value_heads or model_config.num_attention_heads, back=back)
    return pair.B


def interleave(rows: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Put the rows of each attention head, (first half, second half), into rotary pairs, (one of each, one of each, …).

    transformers rotates coordinate i with i + d/2, llama.cpp (for this family) coordinate 2i with 2i + 1.

    Example:
        >>> interleave(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]

    ``back`` undoes it.
    """
    half = rows.shape[0] // heads // 2
    shape = (heads, half, 2) if back else (heads, 2, half)
    order = torch.arange(rows.shape[0]).view(shape).transpose(1, 2).reshape(-1)
    return rows[order]


def read_gguf(path: Path, model_config: Any, names: list[str]) -> list[Pair]:
    """Read an adapter file back: every layer's update, as transformers has it.

    Args:
        path: The file.
        model_config: The base model's transformers config.
        names: Of the base model's modules.
    """
    gguf = _gguf()
    family = ARCHITECTURES[model_config.model_type]
    reader = gguf.GGUFReader(str(path))
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    held = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in reader.tensors
    }
    kinds = {word: kind for kind, word in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[family.name], model_config.num_hidden_layers)
    pairs = []
    for name in names:
        stored = known.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if f"{stored}.lora_a" not in held:
            continue
        A, B = held.pop(f"{stored}.lora_a"), held.pop(f"{stored}.lora_b")
        pair = Pair(name, A, B * (alpha / A.shape[0]))
        pairs.append(Pair(name, A, _reordered(pair, model_config, back=True)) if family.interleaved else pair)
    if held:
        raise ExportError(f"{path.name} was read back and holds {min(held)}, which is no layer of the base model.")
    return pairs


def _check(gguf: Any, path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """Read the file back and compare every tensor bit for bit."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    strange = sorted(found.keys() ^ tensors.keys())
    changed = [n for n, a in tensors.items() if n in found and not np.array_equal(found[n].data.reshape(a.shape), a)]
    if strange or changed:
        raise ExportError(
            f"{path.name} was read back and is not what was written (first: {(strange + changed)[0]}). Write it again, "
            "on another disk if it recurs."
        )
