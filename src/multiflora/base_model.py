"""The base model and its tokenizer, from what a recipe says of them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from multiflora.embedded import embedded_model
from multiflora.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from multiflora.recipe import ModelSpec

log = logging.getLogger(__name__)

__all__ = ["load_config", "load_model", "load_tokenizer", "place_of"]


def place_of(spec: ModelSpec) -> str:
    """Return what ``from_pretrained`` is given: a folder or a hub id; ``embedded`` is unpacked first.

    Raises:
        EnvironmentProblem: The embedded model is not installed or cannot be unpacked.
    """
    return str(embedded_model()) if spec.name == "embedded" else spec.name


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the model's tokenizer.

    Raises:
        ConfigError: There is none at that place.
    """
    from transformers import AutoTokenizer

    place = place_of(spec)
    _say_remote_code(spec)
    try:
        return AutoTokenizer.from_pretrained(place, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded(spec, place, "tokenizer", error) from error


def load_config(spec: ModelSpec) -> Any:
    """Load the model's transformers config: its shapes, without a weight.

    Raises:
        ConfigError: There is none at that place.
    """
    from transformers import AutoConfig

    place = place_of(spec)
    try:
        return AutoConfig.from_pretrained(place, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded(spec, place, "config", error) from error


def load_model(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """Load the base model as a causal language model, on the CPU.

    Args:
        spec: The recipe's ``model``.
        dtype: Type of its weights, see `multiflora.training.precision.weight_dtype`.

    Raises:
        ConfigError: There is no such model, or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    place = place_of(spec)
    try:
        return AutoModelForCausalLM.from_pretrained(
            place,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,  # the other form is a pickle
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(spec, place, "causal language model", error) from error


def _say_remote_code(spec: ModelSpec) -> None:
    """Never run somebody's code in silence, although the recipe asks for it."""
    if spec.trust_remote_code:
        log.warning(
            "The recipe sets model.trust_remote_code: Python code that comes with %s is run on this machine, with your "
            "rights.",
            spec.name,
        )


def _not_loaded(spec: ModelSpec, place: str, what: str, error: Exception) -> ConfigError:
    """Say what was looked for, where, and the library's own first line on why it was not found."""
    why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip().rstrip(".")
    kind = "folder" if os.path.isdir(place) else "hub id or folder"
    return ConfigError(
        f"model.name: no {what} could be loaded from the {kind} {spec.name!r}: {why}. Give a folder with a model in "
        "Hugging Face format, the id of one on the hub (which needs the network once), or 'embedded'."
    )
