"""Whether a model keeps the examples of a folded row apart: found out by trying, before a training relies on it."""

from __future__ import annotations

from typing import Any

import torch

from multiflora.errors import ConfigError

__all__ = ["require_separate_examples"]


def require_separate_examples(model: Any) -> None:
    """Refuse packing where an example could see the one before it in its row.

    Two short examples are put into one row, twice, with another first example the second time. The second example's
    logits must not notice. Models whose attention mask does not come from transformers, and those with a recurrent
    state, would fail.

    Args:
        model: A causal language model.
    Raises:
        ConfigError: The second example noticed the first.
    """
    size = min(model.get_input_embeddings().num_embeddings, 64)
    ids = torch.arange(size, device=model.device)
    first, other, second = ids[:8], ids.flip(0)[:8], ids[2:8]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        one, two = (
            model(input_ids=torch.cat([start, second])[None], position_ids=positions[None], use_cache=False).logits[
                0, len(first) :
            ]
            for start in (first, other)
        )
    model.train(training)
    if float((one - two).abs().max()) > 1e-3 * float(one.abs().max()):
        raise ConfigError(
            f"train.packing is true, but {type(model).__name__} with {model.config._attn_implementation} attention "
            "lets an example see the one before it in its row, so it would train on mixed-up text. Set train.packing "
            "to false; batches are then grouped by length."
        )
