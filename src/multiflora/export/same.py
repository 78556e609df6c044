"""Whether what was written computes what it was made from: by its logits, on a few prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multiflora.errors import ExportError
from multiflora.export.plain import ROOT, Pair
from multiflora.export.source import base_name, load_base, resize
from multiflora.tied import tied_modules, untie

__all__ = ["base_or_warning", "check_logits", "logits_of", "put_in", "with_pairs"]

log = logging.getLogger(__name__)

PROMPTS, LENGTH = 3, 16
# what rounding each weight once may move the logits, as a share of the largest
_ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


def logits_of(model: Any) -> Tensor:
    """A model's logits on a few prompts of random tokens, always the same, (prompts, tokens, vocabulary)."""
    draw = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    ids = torch.randint(size, (PROMPTS, min(LENGTH, context)), generator=draw)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids)).logits
    return logits.cpu()


def check_logits(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare logits up to the rounding of the weights.

    Args:
        found: Of what was written and read back.
        expected: Of what it was made from.
        what: What was written, as the message calls it.

    Raises:
        ExportError: They differ, or are not finite.
    """
    allowed = _ROUNDING.get(found.dtype, 1e-3)
    width = min(found.shape[-1], expected.shape[-1])
    off = (found[..., :width].double() - expected[..., :width].double()).abs().max()
    largest = expected.double().abs().max()
    if not off <= allowed * largest:  # a NaN is not
        raise ExportError(
            f"{what} was read back and does not compute what the adapter does: its logits are off by up to "
            f"{off:.3g}, where the largest is {largest:.3g}. Nothing was written. Keep the adapter, and report this: "
            "it is a fault of multiflora's, or of the disk."
        )


def base_or_warning(source: Path, base: str | Path | None, what: str, dtype: Any = "auto") -> Any:
    """The base model to compare on; None, and a warning, where it is not named or not at hand.

    Args:
        source: The adapter's folder.
        base: What the user named it; then it must be there.
        what: What cannot be compared by logits without it.
        dtype: Of its weights; ``auto``: its own.

    Raises:
        ExportError: ``base`` is given and cannot be loaded.
    """
    try:
        return load_base(base_name(source, base), dtype)
    except ExportError as error:
        if base is not None:
            raise
        log.warning("%s is compared layer by layer, and not by the logits of the whole model. %s", what, error)
        return None


def put_in(model: Any, extras: Mapping[str, Tensor], owner: Path, config: Any = None) -> None:
    """Put what an adapter holds besides its pairs into the base model: biases, modules trained in full, rows of tokens.

    An embedding that grew with the vocabulary makes the model's grow. Where one of two tied weights is changed, the two
    are taken apart.

    Args:
        model: The base model.
        extras: As `multiflora.export.plain.PlainLora.extras` gives them.
        owner: The adapter's folder, for the message.
        config: The adapter's config, where tokens were trained one by one.

    Raises:
        ExportError: The model has no place for one.
    """
    # peft saves the base weight of an adapted output layer, too: it may have grown with the vocabulary
    held = {key.removeprefix(ROOT).replace(".base_layer.", "."): tensor for key, tensor in extras.items()}
    resize(model, {key: tensor.shape for key, tensor in held.items()})
    tokens = {key: held.pop(key) for key in list(held) if key.endswith(_TOKENS)}
    there = model.state_dict()
    for key, tensor in held.items():
        if key not in there:
            raise ExportError(f"{owner} holds {key}, for which the base model has no place; it cannot be merged.")
        if there[key].shape != tensor.shape:
            raise ExportError(
                f"{owner} holds {key} of shape {tuple(tensor.shape)}, and the base model's is "
                f"{tuple(there[key].shape)}. The adapter was trained on another model. Name it with --base."
            )
    tied = tied_modules(model)
    if any(key.rpartition(".")[0] in tied for key in held):
        untie(model)
    model.load_state_dict(held, strict=False)
    for key, tensor in tokens.items():  # peft changes a tied weight's rows in both places
        module = model.get_submodule(key.removesuffix(_TOKENS))
        module.weight.data[_indices(config, key)] = tensor.to(module.weight.dtype)


_TOKENS = ".token_adapter.trainable_tokens_delta"


def _indices(config: Any, key: str) -> list[int]:
    """Which rows of a weight were trained: given for the embedding, or by the module's name."""
    given = getattr(config, "trainable_token_indices", None) or []
    if not isinstance(given, dict):
        return list(given)
    name = key.removesuffix(_TOKENS)
    return next(list(rows) for module, rows in given.items() if name == module or name.endswith(f".{module}"))


@contextmanager
def with_pairs(model: Any, pairs: Iterable[Pair]) -> Iterator[None]:
    r"""Within, every layer of a pair adds :math:`B A x` to its output: a plain LoRA, in nothing but torch."""

    def adding(pair: Pair) -> Any:
        def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].to(pair.A.dtype)
            return output + (x @ pair.A.t() @ pair.B.t()).to(output.dtype)

        return add

    hooks = [model.get_submodule(pair.name).register_forward_hook(adding(pair)) for pair in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
