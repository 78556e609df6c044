"""Adapters of ours among those of vLLM's ``--lora-modules``, each request with its own.

vLLM keeps what it does for LoRA: names, loading and leaving, and which adapter each token of a batch is for. An adapter
of ours is one without matrices to it. In each of its LoRA layers the sum goes past an object of ours, which adds the
branches to the tokens that are theirs, and lets vLLM's own kernels run where there are tokens of its own.

None of this does vLLM promise to keep. Beside `multiflora.integrations.vllm.register`, which puts the manager below in
the place of vLLM's own in the versions that were tried, this is the only file that touches vLLM's LoRA;
tests/integrations/test_vllm_names.py has every name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from multiflora.adapter_tensors import CONFIG
from multiflora.errors import ConfigError
from multiflora.export.saved import open_adapter
from multiflora.files import user_path
from multiflora.integrations.vllm.branches import Slice, add, places, slices_of
from multiflora.integrations.vllm.section import check_adapter, task_of
from multiflora.peft_bridge import STEM

__all__ = ["Batch", "RoutedAdapter", "RoutedManager", "RoutedWorkerManager", "Sum", "named"]


def named(path: str) -> tuple[Path, str | None] | None:
    """The folder and the task that ``FOLDER`` or ``FOLDER#TASK`` names; None where no adapter of ours is there."""
    folder, task = user_path(path), None
    if not folder.is_dir() and "#" in path:
        word, _, task = path.rpartition("#")
        folder = user_path(word)
    try:
        kind = json.loads((folder / CONFIG).read_bytes())["peft_type"]
    except (OSError, ValueError, TypeError, KeyError):  # what else is wrong with it, vLLM says
        return None
    return (folder, task) if str(kind).startswith(STEM.upper()) else None


class RoutedAdapter(LoRAModel):
    """An adapter of ours, as vLLM keeps adapters.

    Args:
        number: vLLM's for it.
        layers: Its branches, by the name of vLLM's layer.
    """

    def __init__(self, number: int, layers: dict[str, list[Slice]]) -> None:
        nothing = torch.zeros(1, 1)  # vLLM counts on a pair of factors: here for a layer that no model has
        super().__init__(number, 1, {"": LoRALayerWeights("", 1, 1, nothing, nothing.clone())})
        self.layers = layers


class Batch:
    """Which tokens of the batch that is running are whose."""

    def __init__(self) -> None:
        self.ours: list[tuple[RoutedAdapter, slice | Tensor]] = []
        """Our adapters, each with its tokens."""
        self.theirs = False
        """Whether there are tokens of vLLM's own adapters."""
        self.others: slice | Tensor = slice(0)
        """All tokens but those."""

    def take(self, ids: Sequence[int], adapter_of: Callable[[int], Any], device: torch.device) -> None:
        """Take a new batch.

        Args:
            ids: vLLM's number of each token's adapter, 0 for the base model.
            adapter_of: The adapter by its number.
            device: Where the tokens are.
        """
        tokens: dict[int, list[int]] = {}
        for k, number in enumerate(ids):
            tokens.setdefault(int(number), []).append(k)
        adapters = {number: adapter_of(number) for number in tokens if number > 0}
        ours = {number: one for number, one in adapters.items() if isinstance(one, RoutedAdapter)}
        self.ours = [(one, _index(tokens[number], device)) for number, one in ours.items()]
        own = adapters.keys() - ours.keys()
        self.theirs = bool(own)
        self.others = _index(sorted(k for number in tokens.keys() - own for k in tokens[number]), device)


def _index(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """A slice where that is the same: it needs no copies."""
    if not numbers:
        return slice(0)
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, device=device)


class Sum:
    """What one of vLLM's LoRA layers is told to add its adapters with.

    Args:
        theirs: vLLM's own.
        name: The layer.
        batch: The batch that is running.
    """

    def __init__(self, theirs: Any, name: str, batch: Batch) -> None:
        self._theirs = theirs
        self._name = name
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def add_lora_linear(self, y: Tensor, x: Tensor, *words: Any, **more: Any) -> None:
        """Add every token's adapter to the layer's output y, (T, d_out), for its input x, in place."""
        batch = self._batch
        if batch.theirs:
            # on processors vLLM 0.32 adds the adapter of its last place to tokens that have none (vllm#48421)
            kept = y[batch.others].clone()
            self._theirs.add_lora_linear(y, x, *words, **more)
            y[batch.others] = kept
        for adapter, tokens in batch.ours:
            if (slices := adapter.layers.get(self._name)) is not None:
                own = y[tokens]
                add(slices, x[tokens], own)
                if isinstance(tokens, Tensor):  # then it was a copy
                    y[tokens] = own


class RoutedManager(LRUCacheLoRAModelManager):
    """vLLM's manager of the adapters of a model, which knows ours, too."""

    def __init__(self, *, vllm_config: Any, **words: Any) -> None:
        super().__init__(vllm_config=vllm_config, **words)
        self.vllm_config = vllm_config
        self.batch = Batch()
        linear = {name: one for name, one in self.modules.items() if isinstance(one, BaseLinearLayerWithLoRA)}
        for name, layer in linear.items():
            layer.set_mapping(Sum(layer.punica_wrapper, name, self.batch))
        self.places = places({name: one.base_layer for name, one in linear.items()}, self.packed_modules_mapping)

    def set_adapter_mapping(self, mapping: Any) -> None:
        """Called before each pass, with the adapter of each token."""
        super().set_adapter_mapping(mapping)
        self.batch.take(mapping.index_mapping, self.get_adapter, self.device)

    def load(self, number: int, folder: Path, task: str | None) -> RoutedAdapter:
        """Load an adapter of ours.

        Args:
            number: vLLM's for it.
            folder: Where it is.
            task: Its task, for methods that need one.

        Raises:
            ConfigError: It needs a task, or vLLM's settings do not allow it.
            ExportError: A file is damaged.
            AdapterError: It has no such task, or was trained on another model.
        """
        adapter, config = open_adapter(folder), self.vllm_config
        which = int(task) if task and task.isdecimal() and not adapter.config.task_names else task
        index = task_of(adapter, which, f"Name it after the folder: {folder}#TASK, once for each task that is served.")
        if config.compilation_config.mode not in (None, CompilationMode.NONE):
            raise ConfigError(
                f"vLLM compiles the model, and {folder} comes beside others, which compiled code knows nothing of. Add "
                "--enforce-eager."
            )
        if self.lora_config.fully_sharded_loras:
            raise ConfigError(f"--fully-sharded-loras is given, which would pass {folder} by. Leave it out.")
        check_adapter(config, adapter)
        layers: dict[str, list[Slice]] = {}
        for place, one in slices_of(adapter, index, self.model, self.places, config.model_config.dtype):
            layers.setdefault(place.name, []).append(one)
        return RoutedAdapter(number, layers)


class RoutedWorkerManager(LRUCacheWorkerLoRAManager):
    """What a worker of vLLM's asks for adapters."""

    _manager_cls = RoutedManager

    def _load_adapter(self, lora_request: Any) -> Any:
        found = named(lora_request.lora_path)
        if found is None:
            return super()._load_adapter(lora_request)
        return self._adapter_manager.load(lora_request.lora_int_id, *found)
