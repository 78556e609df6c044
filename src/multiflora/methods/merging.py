"""Merging: an adapter's update is added to the base weight, exactly, or it is refused."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from multiflora.errors import AdapterError, ExportError
from multiflora.methods.layer_weights import BranchWeights

__all__ = ["Merged", "MergingLayer"]


class Merged(NamedTuple):
    """What was added to the base weight: kept, so that the same is taken off again, whatever the adapter became."""

    task: int | None
    """The task that it is the update of, for methods with one for each."""
    A: Tensor
    B: Tensor


class MergingLayer(BranchWeights):
    """A layer whose adapters can be merged into its base weight, and taken off again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._merged: dict[str, Merged] = {}

    def _task_to_merge(self, adapter_name: str) -> int | None:
        return self.routing.single(self.configs[adapter_name]) if self.method_of(adapter_name).needs_task() else None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the layout of the base weight, float32 at least.

        Raises:
            ExportError: The update is not one matrix.
        """
        return self._delta(*self.factors(adapter_name, task=self._task_to_merge(adapter_name)))

    def _has_weight(self) -> bool:
        """Whether the base weight is a parameter, and not computed from others in each pass."""
        return self.get_base_layer()._parameters.get("weight") is not None

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).t() if isinstance(self.get_base_layer(), Conv1D) else B @ A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is one matrix (peft asks before ``convert_to_lora``)."""
        return self.method_of(adapter_name).merges() == "exactly"

    def updates(self, adapter_names: list[str] | None = None, *, safe_merge: bool = False) -> dict[str, Merged]:
        """What a merge would add to the base weight, by adapter; those that are merged already are left out.

        Args:
            adapter_names: Which adapters; None: the active ones.
            safe_merge: Refuse an update that would make the weight infinite or NaN.

        Raises:
            ExportError: The merged layer would not equal the unmerged one. Nothing has been changed.
        """
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ExportError(
                f"Cannot merge into {self.name}: {backend.backend_name} weights cannot be read back and written. "
                "Keep the adapter beside the quantised model, or merge into the unquantised one."
            )
        found: dict[str, Merged] = {}
        weight = self.get_base_weight() if safe_merge else None
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.configs:
                continue
            task = self._task_to_merge(name)
            # copies: a factor may be the parameter itself, which training changes in place
            update = Merged(task, *(factor.detach().clone() for factor in self.factors(name, task=task)))
            merged = self._merged.get(name)
            if merged is not None:
                if merged.task != task:
                    raise ExportError(
                        f"The adapter {name} is already merged into {self.name}, for "
                        f"{self._task_name(name, merged.task)}; call unmerge_adapter() before it is merged for "
                        f"{self._task_name(name, task)}."
                    )
                continue
            if weight is not None:
                weight = self._added(update, weight)
                if not torch.isfinite(weight).all():
                    raise ExportError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            found[name] = update
        if found and backend is None and not self._has_weight():
            raise ExportError(
                f"Cannot merge into {self.name}: its weight is computed anew in each forward pass (pruned, or "
                "parametrised), so what is added to it would be lost. Make it a plain weight first, with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
        return found

    def _added(self, update: Merged, weight: Tensor, sign: int = 1) -> Tensor:
        """A base weight with an update added or taken off, rounded once."""
        delta = self._delta(update.A, update.B)
        return (weight.to(delta.dtype) + sign * delta.to(weight.device)).to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the base weight; ``safe_merge`` checks that the result is finite first.

        Raises:
            ExportError: See `updates`; nothing has been changed.
        """
        wanted = check_adapters_to_merge(self, adapter_names)  # which says what is merged already
        for name, update in self.updates(adapter_names, safe_merge=safe_merge).items():
            if name in wanted:
                self.set_base_weight(self._added(update, self.get_base_weight()))
                self.merged_adapters.append(name)
                self._merged[name] = update

    def unmerge(self) -> None:
        """Take the merged ΔW off again (in low precision up to rounding, as with peft's LoRA)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            update = self._merged.pop(self.merged_adapters.pop())
            self.set_base_weight(self._added(update, self.get_base_weight(), -1))

    def _task_name(self, adapter_name: str, task: int | None) -> str:
        names = self.configs[adapter_name].task_names
        return f"the task {names[task]!r}" if names and task is not None else f"task {task}"

    def _check_merged_task(self, adapter_name: str, merged: int | None) -> None:
        """Refuse rows of another task than the one whose weight is in the base now."""
        if merged is None:
            return
        tasks = self.routing.now().ids_for(self.configs[adapter_name])
        if tasks is None:
            return
        message = (
            f"The adapter {adapter_name} is merged for {self._task_name(adapter_name, merged)}, and the batch has rows "
            "of another task. Call unmerge_adapter() first, or leave the task out."
        )
        same = (tasks == merged).all()
        if torch.compiler.is_compiling():
            torch._assert_async(same, message)  # no Python branch: it would break the graph
        elif not same:
            raise AdapterError(message)
