"""Which task each row belongs to, and what the layers tell back: one small object shared by all layers of a model.

It is filled by a forward pre-hook on the base model, which takes our keyword ``task_id`` out of the call. That works
the same under ``PeftModel``, transformers' own ``add_adapter`` and ``generate``; and as the state stays until the next
forward pass, a block recomputed by gradient checkpointing sees what it saw first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from multiflora.errors import AdapterError

TaskName = str | int

_PASSES = itertools.count()


class Recorder(Protocol):
    """Something that wants to see every gate, such as a routing monitor."""

    def __call__(self, layer: str, gate: Tensor, tasks: Tensor | None) -> None:
        """Take a layer's gate, (T, H), without gradient, and the task of each token, (T,) or None."""


class Routing:
    """What layers need to know about the batch, and what they report.

    Attributes:
        default: Task of every row, or of each, while no ``task_id`` comes with the batch (see :func:`task`).
        losses: What each layer adds to the loss, collected since the last forward pass began.
        recorder: Called with every gate, or None.
        layers: How many layers carry each adapter.
        loop: Compute head by head (:func:`multiflora.ops.loop`) instead of packed.
    """

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}
        self.layers: dict[str, int] = {}
        self.default: TaskName | Sequence[TaskName] | None = None
        self.recorder: Recorder | None = None
        self.loop = False
        self.losses: list[Tensor] = []
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._batch: int | None = None
        self.number: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a model starts between two batches: the last batch's tensors hold graphs and cannot be copied
        return self.__dict__ | {"losses": [], "recorder": None, "_ids": None, "_mask": None, "_batch": None}

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook of the base model: remember the batch's tasks and padding, take our own words out.

        ``task_id`` is one. ``real_tokens``, (rows, length), is the other: it tells fill from text where that is in no
        ``attention_mask``, as in packed rows.
        """
        ids, real = kwargs.pop("task_id", None), kwargs.pop("real_tokens", None)
        first = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0),
            None,
        )
        mask = kwargs.get("attention_mask") if real is None else real
        self._batch = None if first is None else first.shape[0]
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._ids = None if ids is None else self._checked(ids)
        if self._ids is not None and self._batch and self._ids.numel() > 1 and self._ids.shape[0] != self._batch:
            raise AdapterError(
                f"task_id has shape {tuple(self._ids.shape)}, but the batch has {self._batch} rows. Give one id "
                "for each row, (rows,), or for each token, (rows, length)."
            )
        self.losses = []
        cache = kwargs.get("past_key_values")
        if self.number is None or cache is None or not cache.get_seq_length():
            self.number = next(_PASSES)
        return args, kwargs

    def _checked(self, ids: Any) -> Tensor:
        if isinstance(ids, (list, tuple)):
            config = next(iter(self.configs.values()), None)
            ids = torch.tensor([index_of(config, which) for which in ids])
        elif not isinstance(ids, Tensor):
            ids = torch.tensor([ids])
        if ids.is_floating_point() or ids.dim() not in (0, 1, 2):
            raise AdapterError(
                f"task_id is a tensor of {ids.dtype} with shape {tuple(ids.shape)}; it must hold whole numbers, one "
                "for each row, (rows,), or for each token, (rows, length)."
            )
        # on a GPU this check would wait for the device; the collator has made it there
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            for config in self.configs.values():
                if config.num_tasks and not 0 <= int(ids.min()) <= int(ids.max()) < config.num_tasks:
                    raise AdapterError(
                        f"task_id goes from {int(ids.min())} to {int(ids.max())}, but the adapter has "
                        f"{config.num_tasks} tasks ({_names(config)}). Give ids from 0 to {config.num_tasks - 1}."
                    )
        checked: Tensor = ids.long()
        return checked

    def rows(self, tokens: int) -> int:
        """How many rows the batch has, for a layer that sees ``tokens`` tokens."""
        return self._batch if self._batch and tokens % self._batch == 0 else 1

    def keep(self, tokens: int) -> Tensor | None:
        """1 for real tokens and 0 for padding, (T,), or None where that is not known."""
        return self._mask.reshape(-1) if self._mask is not None and self._mask.numel() == tokens else None

    def tasks(self, config: Any, lead: torch.Size, device: torch.device) -> Tensor | None:
        """The task of each token of an input with leading shape ``lead``, (T,), or None where none is known."""
        ids = self._ids_of_rows(config)
        if ids is None:
            return None
        tokens = lead.numel()
        if ids.numel() not in (1, tokens) and (ids.dim() == 2 or tokens % ids.shape[0]):
            raise AdapterError(
                f"task_id has shape {tuple(ids.shape)}, which does not fit a layer input of shape {tuple(lead)}. "
                "Give one id for each row, or for each token."
            )
        # a row's tokens lie together; so do the copies of a row that beam search makes
        return ids.to(device).reshape(-1).repeat_interleave(tokens // ids.numel())

    def _ids_of_rows(self, config: Any) -> Tensor | None:
        return self._ids if self._ids is not None else self._default_ids(config)

    def _default_ids(self, config: Any) -> Tensor | None:
        which = self.default if self.default is not None else (0 if config.num_tasks == 1 else None)
        if which is None:
            return None
        each = [which] if isinstance(which, (str, int)) else which
        return torch.tensor([index_of(config, one) for one in each])

    def single(self, config: Any) -> int | None:
        """The one task set for all rows, or None: for merging, which makes one matrix whatever the last batch was."""
        ids = self._default_ids(config)
        return int(ids[0]) if ids is not None and ids.numel() == 1 else None

    def one_task(self, config: Any) -> int | None:
        """The one task of all rows of the batch, or None where there are several or none is known."""
        ids = self._ids_of_rows(config)
        if ids is None or not ids.numel():
            return None
        first = int(ids.reshape(-1)[0])
        return first if ids.numel() == 1 or bool((ids == first).all()) else None

    def task_of_rows(self, config: Any, device: torch.device, rows: int) -> Tensor:
        """The task of each row, (rows,); the row's first token decides where ids are per token."""
        ids = self._ids_of_rows(config)
        if ids is None:
            raise missing(config)
        first = ids[:, 0] if ids.dim() == 2 else ids
        return first.to(device).repeat_interleave(rows // first.numel())


def _names(config: Any) -> str:
    return ", ".join(config.task_names) if config.task_names else f"0 to {(config.num_tasks or 0) - 1}"


def missing(config: Any) -> AdapterError:
    """The error for a method that needs tasks and got none."""
    return AdapterError(
        f"A {config.method_name} adapter needs the task of each row, and none was given. Pass task_id=... with the "
        f"batch or use `with multiflora.task(model, TASK):`; its tasks are {_names(config)}."
    )


def index_of(config: Any, which: TaskName) -> int:
    """A task's id, from its name or id, checked against the config.

    Raises:
        AdapterError: There is no such task; the message lists those there are.
    """
    if isinstance(which, str):
        if config is not None and config.task_names and which in config.task_names:
            return int(config.task_names.index(which))
    elif config is None or config.num_tasks is None or 0 <= which < config.num_tasks:
        return int(which)
    known = _names(config) if config is not None and config.num_tasks else "not named in its config (set task_names)"
    raise AdapterError(f"The adapter has no task {which!r}; its tasks are {known}.")


def find(model: nn.Module) -> Routing | None:
    """The routing state of a model with multiflora adapters, or None for any other model."""
    for module in model.modules():
        routing = getattr(module, "routing", None)
        if isinstance(routing, Routing):
            return routing
    return None


@contextmanager
def task(model: nn.Module, which: TaskName | Sequence[TaskName]) -> Iterator[None]:
    """All rows inside belong to this task: for generation, evaluation and merging of methods gated by task.

    With a list, each row has its own (as ``generate`` repeats rows for beam search, so are their tasks). A ``task_id``
    given with a batch comes first. Models without multiflora adapters, and adapters that were told of no tasks, are
    left as they are.

    Args:
        model: Any model, wrapped by peft or not.
        which: Name (one of the config's ``task_names``) or id of the task; or a list, one for each row.

    Raises:
        AdapterError: The adapter knows its tasks and this is none of them.
    """
    routing = find(model)
    if routing is None:
        yield
        return
    for config in routing.configs.values():
        if config.num_tasks:
            for one in [which] if isinstance(which, (str, int)) else which:
                index_of(config, one)
    before, routing.default = routing.default, which
    try:
        yield
    finally:
        routing.default = before


@contextmanager
def reference_loop(model: nn.Module) -> Iterator[None]:
    """Compute head by head inside (:func:`multiflora.ops.loop`), as published code does: the same sum, slowly.

    To see whether a doubtful result comes from the packed arithmetic. Under ``torch.compile`` enter it before the first
    call. Models without multiflora adapters are left as they are.

    Args:
        model: Any model, wrapped by peft or not.

    Example:
        >>> with reference_loop(torch.nn.Linear(2, 2)):
        ...     pass
    """
    routing = find(model)
    if routing is None:
        yield
        return
    before, routing.loop = routing.loop, True
    try:
        yield
    finally:
        routing.loop = before


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """What the routers of the last forward pass add to the loss (balance and z-losses, already weighted): their sum.

    One call in a plain training loop: ``loss = criterion(...) + multiflora.auxiliary_loss(model)``. It is 0.0 for
    models and settings without such losses.

    Raises:
        AdapterError: The losses were computed without gradient although the model is training, as re-entrant gradient
            checkpointing does; nothing would be learned from them.
    """
    routing = find(model)
    if routing is None or not routing.losses:
        return 0.0
    total = torch.stack([loss.to(routing.losses[0].device) for loss in routing.losses]).sum()
    if torch.is_grad_enabled() and model.training and not total.requires_grad:
        raise AdapterError(
            "The routers' losses carry no gradient although the model is training. Re-entrant gradient checkpointing "
            'hides them: use gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    return total


def configs_of(model: nn.Module) -> Mapping[str, Any]:
    """The configs of all multiflora adapters on a model, by adapter name; empty for any other model."""
    routing = find(model)
    return {} if routing is None else routing.configs
