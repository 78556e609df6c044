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
from multiflora.export.plain import ROOT, Pair, write_lora

__all__ = ["FewShotLoss", "factors_of", "put_factors", "with_lora"]

_ROWS = 8
"""Examples of a forward pass."""


def with_lora(base: Any, config: Any, pairs: Sequence[Pair]) -> Any:
    """Put a plain LoRA on a base model, in eval mode.

    Args:
        base: The base model.
        config: A peft config that names the adapted modules.
        pairs: The factors.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as scratch:
        write_lora(Path(scratch), pairs, config)
        return PeftModel.from_pretrained(base, scratch).eval()


def factors_of(model: Any) -> list[Pair]:
    """Copy the factors of a model's LoRA, as they are: its scale is not inside B.

    Args:
        model: A model with one plain LoRA.
    """
    return [
        Pair(name, layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
        for name, layer in _layers(model).items()
    ]


@torch.no_grad()
def put_factors(model: Any, pairs: Sequence[Pair]) -> None:
    """Give a model's LoRA other factors.

    Args:
        model: A model with one plain LoRA.
        pairs: Factors of the right shapes.
    """
    layers = _layers(model)
    for pair in pairs:
        layers[pair.name].lora_A["default"].weight.copy_(pair.A)
        layers[pair.name].lora_B["default"].weight.copy_(pair.B)


def _layers(model: Any) -> dict[str, Any]:
    """The linear layers that a LoRA adapts, by their names in the base model."""
    from peft.tuners.lora.layer import LoraLayer

    return {
        name.removeprefix(ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }


class FewShotLoss:
    """Mean loss on the examples' answers, in nats per token, of a model whose LoRA's factors change.

    Args:
        model: A model with one plain LoRA; afterwards it has the factors that were asked for last.
        examples: As tokens; at least one must carry loss.
    """

    def __init__(self, model: Any, examples: Sequence[Tokens]) -> None:
        self.model = model.eval()
        self.batches = [_padded(examples[start : start + _ROWS]) for start in range(0, len(examples), _ROWS)]

    def __call__(self, pairs: Sequence[Pair]) -> float:
        """The loss with these factors; without any, that of the base model."""
        put_factors(self.model, pairs)
        with torch.inference_mode():
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
