"""An adapter's folder, looked at before anything is built from it: it may come from anybody.

``adapter_config.json`` and ``adapter_model.safetensors`` must agree with each other, and with the base model where one
is at hand, tensor by tensor. A rank of a billion, a missing head, a NaN or another method's file is refused by name,
before memory is taken. Pickles are not read at all.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from multiflora.adapter_tensors import CONFIG, ROOT, misfits, tensor_problems
from multiflora.errors import AdapterError, MultifloraError
from multiflora.methods.settings import setting_problems
from multiflora.patterns import pattern_problems
from multiflora.suggest import did_you_mean, listed, shown
from multiflora.tensor_file import TensorFile
from multiflora.tied import check_tied, tied_modules

__all__ = ["WEIGHTS", "check_adapter", "check_there", "load_adapter"]

WEIGHTS = "adapter_model.safetensors"

LONGEST_CONFIG = 2_000_000
"""Bytes of the longest adapter_config.json."""
# settings that have peft import a module by its name, or copy the base model's layers over and over
_NEVER = ("megatron_config", "layer_replication")


def check_adapter(folder: Path, error: type[MultifloraError] = AdapterError) -> Any:
    """Check that a folder holds one whole adapter, and return its config; nothing is built, a tensor at a time is held.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        error: The kind of error to raise.

    Returns:
        The ``peft.PeftConfig``.

    Raises:
        MultifloraError: Of that kind; names the file, and the tensor or setting that is wrong.
    """
    config = _config(folder, error)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise error(
            f"{folder} holds adapter_model.bin, a pickle, which can carry code and is not read; expected {WEIGHTS}. "
            "Ask for it in that form, or load it where you trust it and save it with safe_serialization=True."
        )
    with TensorFile(folder / WEIGHTS, error) as file:
        for problem in pattern_problems(vars(config), (name.removeprefix(ROOT) for name in file.names)):
            raise error(f"{folder / CONFIG}: {problem}")
        for problem in tensor_problems(config, file):
            raise error(f"{file.path}: {problem}")
    return config


def check_there(folder: Path, error: type[MultifloraError] = AdapterError) -> None:
    """Refuse a folder without an adapter, saying what is there instead.

    Raises:
        MultifloraError: Of that kind.
    """
    if (folder / CONFIG).is_file():
        return
    wanted = "Give the folder an adapter was saved to, such as a run's output folder."
    if not folder.is_dir():
        raise error(f"{folder} {'is a file, no folder' if folder.exists() else 'does not exist'}. {wanted}")
    names = sorted(path.name for path in folder.iterdir())
    there = listed(names, 12) if names else "nothing"
    if "recipe.yaml" in names and "config.json" in names:
        wanted = "The run in it trained a whole model, which is used as it is: nothing is left to convert or to merge."
    elif "recipe.yaml" in names or "checkpoints" in names:
        wanted = (
            "The run in it is not finished: go on with `multiflora train RECIPE --resume`, or give one of its "
            f"checkpoints, a folder in {folder / 'checkpoints'}."
        )
    raise error(f"{folder} holds no adapter: {CONFIG} is missing; there is {there}. {wanted}")


def load_adapter(base: Any, folder: Path, *, may_untie: bool = False, **words: Any) -> Any:
    """Put a saved adapter on a base model, checked before and after.

    Args:
        base: The model in memory.
        folder: The adapter's folder.
        may_untie: Take an adapter that changes one of two tied weights: the model must not be tied again.
        words: Passed on to ``peft.PeftModel.from_pretrained``.

    Raises:
        AdapterError: The folder's files are damaged or do not fit the base model; names file and tensor.
    """
    import peft

    config = check_adapter(folder)
    for problem in pattern_problems(vars(config), (name for name, _ in base.named_modules())):
        raise AdapterError(f"{folder / CONFIG}: {problem}")
    with TensorFile(folder / WEIGHTS) as file:
        for problem in misfits(config, file, base):
            raise AdapterError(f"{file.path}: {problem}")
        names = set(file.names)
    tied = {} if may_untie else tied_modules(base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # which is an error, below
            model = peft.PeftModel.from_pretrained(base, str(folder), **words)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError) as fault:
        if isinstance(fault, MultifloraError):
            raise
        raise AdapterError(f"The adapter in {folder} does not fit the base model: {_first_line(fault)}") from fault
    check_tied(model, tied)
    wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = sorted(wanted - names)
    if missing:
        raise AdapterError(
            f"{folder / WEIGHTS} lacks {len(missing)} of the {len(wanted)} tensors of its adapter (first: "
            f"{missing[0]}); it would be left at its random start. Save the adapter again."
        )
    # an embedding that grew is saved along under its own name; anything else has no place in the model
    held = {re.sub(r"\.default(?=\.|$)", "", name) for name in model.state_dict()}
    strange = sorted(name for name in names - wanted if name not in held and name.removeprefix(ROOT) not in held)
    if strange:
        raise AdapterError(
            f"{folder / WEIGHTS} holds {strange[0]}, for which the model with this adapter has no place"
            f"{f' (and {len(strange) - 1} more)' if len(strange) > 1 else ''}. It belongs to another adapter or model."
        )
    return model


def _first_line(fault: BaseException) -> str:
    return next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__).strip()[:300]


# ---- the config -----------------------------------------------------------------------------------------------------


def _config(folder: Path, error: type[MultifloraError]) -> Any:
    """Read adapter_config.json as what it says it is."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    check_there(folder, error)
    path = folder / CONFIG
    words = _json(path, error)
    kind = words.get("peft_type")
    known = {str(getattr(each, "value", each)): each for each in PEFT_TYPE_TO_CONFIG_MAPPING}
    if not isinstance(kind, str) or kind not in known:
        raise error(
            f"{path}: peft_type is {shown(kind)}, which is not a kind of adapter; {did_you_mean(str(kind), known)}"
        )
    for problem in _config_problems(words, known[kind]):
        raise error(f"{path}: {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings of newer versions, which are left out
            return peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as fault:
        raise error(f"{path} cannot be read: {_first_line(fault)}. Save the adapter again.") from fault


def _json(path: Path, error: type[MultifloraError]) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > LONGEST_CONFIG:
            raise error(f"{path} has {size:,} bytes; expected the settings of an adapter. Save the adapter again.")
        words = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        if isinstance(fault, MultifloraError):
            raise
        raise error(f"{path} cannot be read: {_first_line(fault)}. Save the adapter again.") from fault
    if not isinstance(words, dict):
        raise error(f"{path} holds a {type(words).__name__}; expected an object of settings. Save the adapter again.")
    return words


def _config_problems(words: Mapping[str, Any], kind: Any) -> Iterator[str]:
    """What must not stand in a config of a kind."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for key in _NEVER:
        if words.get(key):
            yield f"{key} is set, which is not loaded from a file: it has peft import code, or copy layers. Remove it."
    yield from setting_problems(PEFT_TYPE_TO_CONFIG_MAPPING[kind], words, is_saved=True)
