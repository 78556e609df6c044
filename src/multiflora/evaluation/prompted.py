"""Generation behind a learned prompt, such that what a row gets does not depend on its batch mates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["generate_behind_prompt"]


def generate_behind_prompt(model: Any, context: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """Generate as peft's ``generate`` does, with the prompt right before each row's text.

    peft puts the prompt before the padding of a left-padded row. How far its text then lies from the prompt, and so
    what is generated, depends on the longest row of the batch; in training, where rows are padded on the right, it
    never does.

    Args:
        model: A peft model with learned embeddings before the input (prompt tuning, P-tuning).
        context: (B, T) ids, padded on the left.
        mask: (B, T), 0 for padding.
        settings: For transformers' ``generate``.
    Returns:
        (B, T + new) ids, the context's own first.
    """
    base = model.get_base_model()
    words = base.get_input_embeddings()(context)
    prompt = model.get_prompt(batch_size=len(context)).to(words.dtype)
    ones = mask.new_ones(prompt.shape[:2])
    # a stable order by kind: padding, prompt, text
    order = torch.cat([ones, 2 * mask], 1).argsort(dim=1, stable=True)
    both = torch.cat([prompt, words], 1).gather(1, order.unsqueeze(-1).expand(-1, -1, words.shape[-1]))
    made: Tensor = base.generate(
        inputs_embeds=both, attention_mask=torch.cat([ones, mask], 1).gather(1, order), **settings
    )
    return torch.cat([context, made], 1)
