"""The loss of a model on a few examples, as a function of its LoRA's factors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from multiflora.data.encode import IGNORED
from multiflora.export.examples import Tokens
from multiflora.export.plain import Pair, write_lora

__all__ = ["FewShotLoss"]

_ROWS = 8
"""Examples of a forward pass."""


class FewShotLoss:
    """Mean loss on the examples' answers, in nats per token, of a base model with a plain LoRA whose factors change.

    Args:
        base: The base model.
        config: A peft config that names the adapted modules.
        pairs: Factors of the right shapes.
        examples: As tokens; at least one must carry loss.
    """

    def __init__(self, base: Any, config: Any, pairs: Sequence[Pair], examples: Sequence[Tokens]) -> None:
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as scratch:
            write_lora(Path(scratch), pairs, config)
            self.model = PeftModel.from_pretrained(base, scratch).eval()
        self.layers: dict[str, Any] = {
            pair.name: self.model.get_submodule(f"base_model.model.{pair.name}") for pair in pairs
        }
        self.batches = [_padded(examples[start : start + _ROWS]) for start in range(0, len(examples), _ROWS)]

    def __call__(self, pairs: Sequence[Pair]) -> float:
        """The loss with these factors; without any, that of the base model."""
        with torch.inference_mode():
            for pair in pairs:
                layer = self.layers[pair.name]
                layer.lora_A["default"].weight.copy_(pair.A)
                layer.lora_B["default"].weight.copy_(pair.B)
            if pairs:
                return self._mean()
            with self.model.disable_adapter():
                return self._mean()

    def _mean(self) -> float:
        total, tokens = 0.0, 0
        for batch in self.batches:
            ids, mask, labels = (part.to(self.model.device) for part in batch)
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            wanted = labels[:, 1:]
            total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
            tokens += int((wanted != IGNORED).sum())
        return total / max(tokens, 1)


def _padded(rows: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of a batch, padded on the right."""
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (length - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows])
    return ids, mask, labels
