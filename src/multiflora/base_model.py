"""The base model and its tokenizer, from what a recipe says of them."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from multiflora.embedded import embedded_model
from multiflora.errors import ConfigError, MultifloraError
from multiflora.suggest import listed

if TYPE_CHECKING:
    import torch

    from multiflora.recipe import ModelSpec

log = logging.getLogger(__name__)

__all__ = ["empty_model", "load_config", "load_model", "load_tokenizer", "loading", "place_of", "share_weights"]

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def place_of(spec: ModelSpec) -> str:
    """Return what ``from_pretrained`` is given: a folder or a hub id; ``embedded`` is unpacked first.

    Raises:
        EnvironmentProblem: The embedded model is not installed or cannot be unpacked.
    """
    return str(embedded_model()) if spec.name == "embedded" else spec.name


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the model's tokenizer.

    Raises:
        ConfigError: There is none at that place, or it cannot be used.
    """
    from transformers import AutoTokenizer

    place = place_of(spec)
    _say_remote_code(spec)
    with loading("tokenizer", spec.name, _of_recipe, place=place):
        found = AutoTokenizer.from_pretrained(place, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        _try(found)
    return found


def _try(tokenizer: Any) -> None:
    """Use a tokenizer once: settings of another type than theirs are taken when it is loaded, and fail here."""
    ids = [*tokenizer("A word.").input_ids, *tokenizer(["A word."], add_special_tokens=False).input_ids[0]]
    tokenizer.decode(ids, skip_special_tokens=True)
    if not all(isinstance(word, str) for word in tokenizer.special_tokens_map.values()):
        raise TypeError("a special token is no text")


def load_config(spec: ModelSpec) -> Any:
    """Load the model's transformers config: its shapes, without a weight.

    Raises:
        ConfigError: There is none at that place.
    """
    from transformers import AutoConfig

    place = place_of(spec)
    with loading("config", spec.name, _of_recipe, place=place):
        return AutoConfig.from_pretrained(place, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


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
    with loading("causal language model", spec.name, _of_recipe, place=place):
        return AutoModelForCausalLM.from_pretrained(
            place,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,  # the other form is a pickle
        )


def _say_remote_code(spec: ModelSpec) -> None:
    """Never run somebody's code in silence, although the recipe asks for it."""
    if spec.trust_remote_code:
        log.warning(
            "The recipe sets model.trust_remote_code: Python code that comes with %s is run on this machine, with your "
            "rights.",
            spec.name,
        )


@contextmanager
def loading(what: str, name: str, say: Callable[[str], MultifloraError], *, place: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises on a model's files into a paragraph: the files may come from anybody.

    Args:
        what: What is loaded, for the message: ``tokenizer``.
        name: The model, as the user named it.
        say: Makes the error of the paragraph's first part.
        place: The folder or hub id that is read, where it is another one.

    Raises:
        MultifloraError: Something was raised.
    """
    try:
        yield
    except MultifloraError:
        raise
    except Exception as error:  # tokenizers raises plain ones, and each library errors of its own
        raise say(f"No {what} could be loaded from {name!r}: {_why(place or name, error)}") from error


def _why(place: str, error: Exception) -> str:
    """What is missing at a place, or the library's own first line; without a full stop."""
    told = " ".join(str(error).split("\n\n")[0].split())[:300].rstrip(".:") or type(error).__name__
    if os.path.isdir(place):
        there = sorted(os.listdir(place))
        return (
            told
            if "config.json" in there
            else f"the folder holds no config.json, but {listed(there, 12) if there else 'nothing'}"
        )
    if os.path.lexists(place):
        return "it is a file; expected a folder"
    if place.startswith((".", "~", os.sep)) or place.count("/") > 1 or not _HUB_ID.fullmatch(place):
        return "there is no such folder"
    if isinstance(error, OSError) and "connect" in told:
        told = "it is not in the cache, and the hub is not reached (HF_HUB_OFFLINE is set, or there is no network)"
    return f"there is no such folder, and as a model of the hub: {told}"


def _of_recipe(told: str) -> ConfigError:
    return ConfigError(
        f"{told}. Give a folder with a model in Hugging Face format, the id of one on the hub (which needs the network "
        "once), or 'embedded'; in a recipe it is the model's name."
    )


def empty_model(config: Any, *, dtype: Any = None, remote: bool = False) -> Any:
    """Build a causal language model from its config alone, without storage for a single weight.

    Args:
        config: The model's transformers config.
        dtype: Type of its weights.
        remote: Let the config name classes outside transformers.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote)
    model.tie_weights()  # parameters were replaced one by one, so a head that shares the embedding's came apart
    return model


def share_weights(model: Any) -> Any:
    """A second tree of modules over the same tensors: what is put on one does not show on the other."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
