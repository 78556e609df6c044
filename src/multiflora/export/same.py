"""Whether what was written computes what it was made from: by its logits, on a few prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multiflora.errors import ExportError

__all__ = ["check_logits", "logits_of"]

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
