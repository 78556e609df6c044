"""Axolotl's trainer for several tasks: their ids reach the model, and their losses the log."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor, nn

from multiflora.context import configs_of
from multiflora.integrations.axolotl.rows import TASK, TaskCollator
from multiflora.training.losses import loss_by_task, predicted_positions, token_losses

__all__ = ["MultitaskAxolotlTrainer"]


class MultitaskAxolotlTrainer(AxolotlTrainer):
    """Trains as axolotl does; log lines also carry ``loss/<task>``."""

    _signature_columns: list[str] | None

    def __init__(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        # those of the adapter: one that is trained on keeps its own
        self.task_names: list[str] = next((list(c.task_names or ()) for c in configs_of(model).values()), [])
        self._by_task: Tensor | None = None
        if self.task_names:
            for key in ("data_collator", "eval_data_collator"):
                if kwargs.get(key) is not None:
                    kwargs[key] = TaskCollator(kwargs[key], self.task_names)
        super().__init__(*args, model=model, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return axolotl's loss, and note each task's part of it where the model gives its logits."""
        labels, tasks = inputs.get("labels"), inputs.get("task_id")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = getattr(outputs, "logits", None)
        if model.training and labels is not None and tasks is not None and logits is not None:
            self._note(logits.detach(), labels, tasks)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _note(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> None:
        positions, targets = predicted_positions(labels)
        losses = token_losses(logits.flatten(0, 1)[positions], targets)
        # the task of the token that is predicted: in a packed row the one before it may be another's
        both = loss_by_task(losses, tasks.flatten()[positions + 1], len(self.task_names))
        self._by_task = both if self._by_task is None else self._by_task + both

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each task's mean loss since the last line."""
        if "loss" in logs and self._by_task is not None:
            sums, counts = self.accelerator.reduce(self._by_task, "sum").tolist()
            logs |= {
                f"loss/{name}": total / count
                for name, total, count in zip(self.task_names, sums, counts, strict=True)
                if count
            }
            self._by_task = None
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and TASK not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, TASK]
