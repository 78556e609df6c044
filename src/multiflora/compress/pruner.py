"""Takes rows of S away while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiflora.compress.layer import LoSparseLinear, compressed_layers
from multiflora.compress.losparse import kept_rows, remaining, update
from multiflora.compress.spec import CompressSpec

__all__ = ["Pruner"]


class Pruner(TrainerCallback):
    """Follows the importance of every number of S, and sets the least important rows to zero as the schedule says.

    A row that was set to zero goes on learning and may come back at the next pruning, until the schedule has ended;
    from then on the rows are chosen anew, and cleared, after every step.

    Args:
        model: A model after `multiflora.compress.layer.sparsify`.
        spec: The settings.
    """

    def __init__(self, model: torch.nn.Module, spec: CompressSpec) -> None:
        self.spec = spec
        self.layers = list(compressed_layers(model).values())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimiser's step, while the gradients are still there."""
        self.after(state.global_step + 1, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the rows that are zero: what is saved and scored is the smaller model."""
        for layer in self.layers:
            layer.slim()

    @torch.no_grad()
    def after(self, step: int, steps: int) -> None:
        """Take a step into account, and prune if it is time.

        Args:
            step: Steps done.
            steps: All of them.
        """
        spec = self.spec
        for layer in self.layers:
            if layer.S.grad is not None:
                layer.averages = update(layer.averages, layer.S, layer.S.grad, beta1=spec.beta1, beta2=spec.beta2)
        share = remaining(step, steps, keep=spec.keep, start=spec.start, end=spec.end)
        if share < 1 and (step % spec.every == 0 or share == spec.keep or step == steps):
            self.prune(share)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Set all rows but the most important to zero."""
        scores = [layer.averages.rows() for layer in self.layers]
        for layer, kept in zip(self.layers, kept_rows(scores, _widths(self.layers), share), strict=True):
            layer.S[~kept] = 0


def _widths(layers: list[LoSparseLinear]) -> list[int]:
    return [layer.in_features for layer in layers]
