"""An adapter merged into its base model: one ordinary checkpoint, with tokenizer and generation config."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from multiflora.errors import ExportError
from multiflora.export.convert import check_options, to_lora
from multiflora.export.plain import Pair, PlainLora, read_config, read_lora
from multiflora.export.report import Report
from multiflora.export.same import check_logits, logits_of, put_in
from multiflora.export.source import base_name, load_adapted, load_base, load_tokenizer_of
from multiflora.export.stage import check_free, staged
from multiflora.files import user_path, write_json
from multiflora.suggest import shown
from multiflora.tensor_file import check_shards
from multiflora.tied import tied_modules, untie

__all__ = ["merge"]

log = logging.getLogger(__name__)

_SIZE = re.compile(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
_OPTIONS = ("calibration", "fit", "per_task")


def merge(
    adapter: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    shard_size: str = "2GB",
    dtype: Any = "auto",
    **conversion: Any,
) -> Report:
    """Write the base model with the adapter's update inside, as ``AutoModelForCausalLM`` and every server load it.

    The adapter becomes a plain LoRA first, exactly or, for routed methods, by calibration (see `multiflora.to_lora`);
    its update is then added to the base weights layer by layer, in float32, and rounded to the base's dtype once. So
    memory holds one copy of the model, one layer's update and one shard. Every shard is read back and compared, and the
    model that was read back must give the logits of the base model with the adapter on it. Where the adapter changes
    one of two weights that the base model ties, the merged model has both.

    Args:
        adapter: The folder an adapter was saved to.
        folder: Where the model goes; it must not hold anything yet.
        base: The base model's folder or hub id, where the adapter names none.
        shard_size: Largest size of a safetensors shard.
        dtype: Of the merged weights: ``auto`` (as the base model's), or a torch dtype or its name.
        conversion: ``task``, ``calibration``, ``fit``, ``rank``, ... as for `multiflora.to_lora`.

    Returns:
        The conversion's report.

    Raises:
        ExportError: One weight cannot stand for the adapter (a task or calibration is missing), the base model is
            quantised, the dtype cannot hold the merged weights, or the check of the result failed.

    Example:
        >>> merge("runs/mlora", "runs/mlora-dense")  # doctest: +SKIP
    """
    source, output = user_path(adapter), user_path(folder)
    check_free(output)
    if not _SIZE.fullmatch(shard_size):
        raise ExportError(f"shard_size is {shown(shard_size)}; expected a number of KB, MB, GB or TB, such as 2GB.")
    if conversion.get("per_expert"):
        raise ExportError(
            "per_expert writes an adapter for each expert, and a merged model has one weight: name a task."
        )
    check_options(source, read_config(source), **{k: conversion[k] for k in _OPTIONS if k in conversion})
    name = base_name(source, base)
    _refuse_quantised(name)
    with tempfile.TemporaryDirectory() as scratch:
        report = to_lora(source, Path(scratch) / "lora", base=base, **conversion)
        if len(report.adapters) > 1:
            tasks = ", ".join(str(made.task) for made in report.adapters)
            raise ExportError(
                f"{source} has one weight for each task ({tasks}), and a merged model has one. Name it: --task TASK."
            )
        plain = Path(scratch) / "lora" / report.adapters[0].folder
        model = _merged(read_lora(plain), name, dtype)
        with staged(output) as place:
            _save(model, place, shard_size)
            tokenizer, rows = load_tokenizer_of(source, name), model.get_input_embeddings().weight.shape[0]
            if len(tokenizer) > rows:
                log.warning("The tokenizer has %d tokens, but the model has rows for %d only.", len(tokenizer), rows)
            tokenizer.save_pretrained(str(place))
            files = check_shards(place, model.state_dict())
            del model  # so that one is in memory at a time
            expected = logits_of(load_adapted(plain, name, dtype, may_untie=True))
            check_logits(logits_of(load_base(str(place))), expected, f"The model merged from {source}")
            write_json(place / "report.json", report.to_dict())
    log.info("merged model written to %s (%d file(s)) and read back", output, len(files))
    return Report(report.method, report.how, output, report.adapters)


def _refuse_quantised(name: str) -> None:
    """Look at the base model's config before anything is computed."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return  # loading says why
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(
            f"The base model {name} is quantised; merging into rounded weights would not give the adapter's outputs. "
            "Name the unquantised model with --base."
        )


def _save(model: Any, place: Path, shard_size: str) -> None:
    """Save model and generation config; one that transformers reads and will not write goes along as it is."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig()
    model.save_pretrained(str(place), max_shard_size=shard_size)
    model.generation_config = kept
    if kept is not None:
        write_json(place / "generation_config.json", kept.to_dict())


def _merged(lora: PlainLora, name: str, dtype: Any) -> Any:
    """The base model with a plain LoRA merged in, and what was trained in full put in its place."""
    model = load_base(name, dtype)
    if tied_modules(model).keys() & lora.layers.keys():
        untie(model)
    put_in(model, lora.extras(), lora.folder, lora.config)
    for pair in lora.pairs():
        _add(model, pair, name)
    return model


def _add(model: Any, pair: Pair, name: str) -> None:
    """Add one layer's update to its weight: in float32, rounded once."""
    try:
        module = model.get_submodule(pair.name)
    except AttributeError as error:
        raise ExportError(
            f"{name} has no layer {pair.name}; the adapter was trained on another model. Name it with --base."
        ) from error
    weight: Tensor = module.weight.data
    delta = (pair.B @ pair.A).t() if isinstance(module, Conv1D) else pair.B @ pair.A
    if weight.shape != delta.shape:
        raise ExportError(
            f"{pair.name} is {tuple(weight.shape)} in {name} and {tuple(delta.shape)} in the adapter, which was "
            "trained on another model. Name it with --base."
        )
    weight.copy_(weight.to(torch.float32) + delta)
    if not torch.isfinite(weight).all():
        raise ExportError(
            f"{pair.name} with its update does not fit into {str(weight.dtype).removeprefix('torch.')}, whose largest "
            f"number is {torch.finfo(weight.dtype).max:,.0f}. Merge in a wider type, in Python: "
            "merge(ADAPTER, FOLDER, dtype='float32')."
        )
