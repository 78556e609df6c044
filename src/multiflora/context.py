"""Which task each row belongs to, and what the layers tell back: one small object shared by all layers of a model.

A forward pass is opened by a pre-hook on the base model, which takes our keyword ``task_id`` out of the call, and
closed by a hook, which adds what the layers have to say to the loss (:mod:`multiflora.methods.losses`). That works the
same under ``PeftModel``, transformers' own ``add_adapter`` and ``generate``. What a pass knows stays with that pass, in
the thread that runs it: two threads may use one model at once, and a block computed again by gradient checkpointing
finds the pass whose gradient is taken. The task of :func:`task` is a context variable.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from multiflora.auxiliary_losses import pulled, total_of, with_loss
from multiflora.forward_pass import Pass, Side, Tokens
from multiflora.task_ids import Which, are_numbers, checked_ids, index_of, knows

# the tasks set by `task` in this thread or coroutine: (routing, which), the innermost last
_SET: ContextVar[tuple[tuple[Routing, Which], ...]] = ContextVar("multiflora_task", default=())

_PASSES = itertools.count()


class Recorder(Protocol):
    """Something that wants to see every gate, such as a routing monitor."""

    def __call__(self, layer: str, gate: Tensor, tasks: Tensor | None) -> None:
        """Take a layer's gate, (T, H), without gradient, and the task of each token, (T,) or None."""


class Routing:
    """What layers need to know about the batch, and what they report.

    Attributes:
        configs: Each adapter's config, by name.
        decoder_layers: Names of the adapted layers inside a decoder that has an encoder beside it.
        shared_out: Names of the adapted layers that stand beside others like them, which share the tokens out.
        listed: Names of the adapted layers inside any list of modules.
        holders: For each adapter with tensors that layers share, who holds them: group of layers -> layer.
        recorder: Called with every gate, or None.
        loop: Compute head by head (:func:`multiflora.ops.loop`) instead of packed.
    """

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}
        self.decoder_layers: frozenset[str] = frozenset()
        self.shared_out: frozenset[str] = frozenset()
        self.listed: frozenset[str] = frozenset()
        self.holders: dict[str, dict[str, Any]] = {}
        self.recorder: Recorder | None = None
        self.loop = False
        self.told = False
        self._here = _Here()
        # the newest pass of any thread: for a gradient that comes by no output of a pass
        self._newest: Pass | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a model starts between two batches: the last batch's tensors hold graphs and cannot be copied
        state = self.__dict__ | {"recorder": None, "_newest": None}
        del state["_here"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _here=_Here())

    @property
    def default(self) -> Which | None:
        """Task of every row, or of each, that :func:`task` has set in this thread or coroutine."""
        if torch.compiler.is_compiling():  # which knows no context variables
            return self._here.default
        return next((which for routing, which in reversed(_SET.get()) if routing is self), None)

    # ---- one forward pass -------------------------------------------------------------------------------------------

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook: remember the batch's tasks and padding, take our own words out.

        ``task_id`` is one. ``real_tokens``, (rows, length), is the other: it tells fill from text where that is in no
        ``attention_mask``, as in packed rows.
        """
        here = self._here
        ids, real = kwargs.pop("task_id", None), kwargs.pop("real_tokens", None)
        if here.current is not None:  # the backbone inside the whole model
            return args, kwargs
        here.gates.clear()
        found = Pass(self.default, module)
        # a backbone has no loss; what its layers report is fetched by `auxiliary_loss`
        found.learns, found.chosen = module.training, here.chosen
        found.with_gradient = torch.is_grad_enabled()
        first = _first_tensor(args, kwargs)
        mask = kwargs.get("attention_mask") if real is None else real
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if first is not None:
            text = not first.is_floating_point()
            length = first.shape[1] if first.dim() > 2 or (first.dim() == 2 and text) else None
            found.main = Side(first.shape[0], length, mask)
            found.pictures = first.dim() > 3
        if self.decoder_layers:
            found.decoder = _decoder_side(found.main, kwargs)
        found.ids = None if ids is None else checked_ids(ids, found.main.rows)
        if not torch.compiler.is_compiling() and (found.ids is not None or found.default is not None):
            self._check_active(module, found)
        self._warn_of_losses_left_out()
        before = here.last if _has_cache(kwargs) else None
        found.number = next(_PASSES) if before is None else before.number
        here.current = here.last = found
        self._newest = found
        return args, kwargs

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook: the pass is over; what its layers added goes into the model's loss, where it has one."""
        here = self._here
        found = here.current
        if found is None or found.opener is not module:
            return None
        here.current, found.opener = None, None
        found.gates.clear()
        if not found.learns or output is None or not torch.is_grad_enabled():
            return None
        if found.losses:
            output = with_loss(output, found, kwargs)
        if not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(_go_back, here=here, found=found))  # type: ignore[no-untyped-call]
        return output

    def enter(self, passed: Pass | None) -> None:
        """Make a pass the running one, or none: for a caller with several at once, of rows side by side."""
        self._here.current = passed

    def enter_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The decoder's pre-hook: note which states are the encoder's, which some of its layers read."""
        found = self._here.current
        if found is not None:
            found.memory = kwargs.get("encoder_hidden_states")

    def _check_active(self, module: nn.Module, found: Pass) -> None:
        """Refuse ids that an adapter in use does not know, whether it reads them or not; others have no say."""
        layer: Any = next((m for m in module.modules() if getattr(m, "routing", None) is self), None)
        if layer is None or layer.disable_adapters or self._here.mixed:
            return
        for name in layer.active_adapters:
            config = self.configs.get(name)
            if config is not None and (config.num_tasks or (found.ids is not None and not are_numbers(found.ids))):
                found.ids_for(config)

    def _warn_of_losses_left_out(self) -> None:
        before = self._here.last
        if self.told or torch.compiler.is_compiling() or before is None or not (before.losses and before.went_back):
            return
        # said or seen once: on a GPU, to look waits for the device
        self.told = True
        if before.counted != "asked" and not any(bool(one) for one in before.reached):
            of = ", ".join(repr(name) for name in before.losses)
            warnings.warn(
                f"The losses of adapter {of} (balance, alignment) are in no loss: this training takes its loss from "
                "the logits, and not the model's own. Add them after each forward pass: "
                "loss = loss + multiflora.auxiliary_loss(model)",
                UserWarning,
                stacklevel=2,
            )

    def now(self) -> Pass:
        """The pass that is running in this thread, or whose gradient is taken; an empty one outside of any."""
        here = self._here
        if here.current is not None:
            return here.current
        if not torch.compiler.is_compiling() and (graph := _backward_of()) != -1:
            task_of_graph, found = here.gone_back
            if found is not None and task_of_graph == graph:
                return found
            if (latest := found or here.last or self._newest) is not None:
                return latest
        return Pass(self.default)

    def tokens(self, layer: str, x: Tensor, lead: torch.Size | None = None) -> Tokens:
        """What is known of the tokens of a layer's input.

        Args:
            layer: Its name.
            x: The input, (..., d_in).
            lead: The leading shape of the whole batch where x is some rows of it.
        """
        found = self.now()
        side = found.main
        if found.decoder is not None and layer in self.decoder_layers and not _same(x, found.memory):
            side = found.decoder
        lead = x.shape[:-1] if lead is None else lead
        chosen = found.chosen
        if chosen is not None and (lead != chosen.shape or layer in self.shared_out):
            chosen = None
        return Tokens(found, layer, side, lead, chosen, layer in self.shared_out, layer in self.listed)

    def leave(self, adapter: str, block: str, gate: Tensor) -> None:
        """Keep the gate that a block's first layer has made, (H, T), for the other layers of the block.

        It is the pass's where one is running, and the thread's where a block is computed again for its gradient or
        called by itself. Only the newest block's is kept: a layer never takes an older one for its own.
        """
        self._gates()[adapter] = (block, gate)

    def left(self, adapter: str, block: str) -> Tensor | None:
        """The gate that was left for a block; None where another block's is the newest, or there is none."""
        where, gate = self._gates().get(adapter, ("", None))
        return gate if where == block else None

    def _gates(self) -> dict[str, tuple[str, Tensor]]:
        here = self._here
        return here.gates if here.current is None else here.current.gates

    def report(self, adapter: str, loss: Tensor, y: Tensor) -> Tensor:
        """Take what a layer adds to the loss; its output y comes back, for a block computed again with its gradient.

        Re-entrant checkpointing computes a block without gradients at first: what its layers add is in the loss then,
        and learns from the second time.
        """
        found = self._here.current
        if found is not None:
            found.losses.setdefault(adapter, []).append(loss)
        elif loss.requires_grad and not torch.compiler.is_compiling() and _backward_of() != -1:
            pull = self.now().pull.get(adapter)
            if pull is not None:
                y = pulled(y, loss, pull)
        return y

    @contextmanager
    def reporting(self, tokens: Tokens) -> Iterator[None]:
        """A layer reports inside: `keep` is about these tokens."""
        before, self._here.reporting = self._here.reporting, tokens
        try:
            yield
        finally:
            self._here.reporting = before

    def keep(self, tokens: int) -> Tensor | None:
        """1 for real tokens and 0 for padding, (T,), of the layer that reports; None where that is not known."""
        seen = self._here.reporting
        return seen.keep() if seen is not None and seen.num_tokens == tokens else None

    @property
    def number(self) -> int | None:
        """The number of the pass that is running in this thread; None outside of any."""
        found = self._here.current
        return None if found is None else found.number

    def single(self, config: Any) -> int | None:
        """The one task set for all rows, or None: for merging, which makes one matrix whatever the last batch was."""
        ids = Pass(self.default).ids_for(config)
        return int(ids) if ids is not None and ids.numel() == 1 else None

    @property
    def losses(self) -> list[Tensor]:
        """What each layer of this thread's last pass adds to the loss."""
        last = self._here.last
        return [] if last is None else [loss for each in last.losses.values() for loss in each]

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """The rows inside have adapters of their own: which are active says nothing."""
        before, self._here.mixed = self._here.mixed, True
        try:
            yield
        finally:
            self._here.mixed = before


class _Here(threading.local):
    """What belongs to one thread."""

    def __init__(self) -> None:
        # set for each thread, and no defaults of the class: compiled code is guarded by which attributes there are
        self.current: Pass | None = None
        """The pass that is running."""
        self.last: Pass | None = None
        """The newest one, running or over."""
        self.gone_back: tuple[int, Pass | None] = (-1, None)
        """Which pass a gradient has reached: number of the gradient's computation, and the pass."""
        self.default: Which | None = None
        """What `task` has set: for compiled code, which cannot read a context variable."""
        self.mixed = False
        self.gates: dict[str, tuple[str, Tensor]] = {}
        """The newest gates that a block's layers share, outside of a pass: adapter -> block and gate."""
        self.reporting: Tokens | None = None
        self.chosen: Tensor | None = None
        """Set by `chosen_positions`, for the passes that begin inside."""


def _has_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether the pass goes on with what an earlier one has kept of its tokens."""
    cache: Any = kwargs.get("past_key_values")
    return hasattr(cache, "get_seq_length") and bool(cache.get_seq_length())


def _backward_of() -> int:
    """Number of the gradient computation that this thread is in; -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def _go_back(grad: Tensor, *, here: _Here, found: Pass) -> None:
    """The hook of a pass's outputs: the gradient comes by, so blocks that are computed again now are this pass's."""
    here.gone_back = (_backward_of(), found)
    found.went_back = True


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What has a row for each row of the batch."""
    words = [value for name, value in kwargs.items() if name != "labels" and not name.endswith("mask")]
    everything = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *words, kwargs.get("labels"))
    return next((value for value in everything if isinstance(value, Tensor) and value.dim() > 0), None)


def _decoder_side(encoder: Side, kwargs: Mapping[str, Any]) -> Side:
    ids = next(
        (v for k in ("decoder_input_ids", "decoder_inputs_embeds", "labels") if isinstance(v := kwargs.get(k), Tensor)),
        None,
    )
    mask = kwargs.get("decoder_attention_mask")
    length = ids.shape[1] if ids is not None and ids.dim() > 1 else None
    return Side(encoder.rows, length, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)


def _same(x: Tensor, memory: Tensor | None) -> bool:
    """Whether a layer's input is the encoder's states: the same memory, where a block is computed again."""
    if memory is None or x is memory:
        return x is memory
    return not torch.compiler.is_compiling() and x.shape == memory.shape and x.data_ptr() == memory.data_ptr()


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in values:
            if isinstance(value, Tensor):
                yield value


def find(model: nn.Module) -> Routing | None:
    """The routing state of a model with multiflora adapters, or None for any other model."""
    for module in model.modules():
        routing = getattr(module, "routing", None)
        if isinstance(routing, Routing):
            return routing
    return None


@contextmanager
def task(model: nn.Module, which: Which) -> Iterator[None]:
    """All rows inside belong to this task: for generation, evaluation and merging of methods gated by task.

    With a list, each row has its own (as ``generate`` repeats rows for beam search, so are their tasks). A ``task_id``
    given with a batch comes first. It holds in this thread and coroutine alone. Names and ids are read by the list of
    tasks of each adapter that is used. Models without multiflora adapters, and adapters that were told of no tasks, are
    left as they are.

    Args:
        model: Any model, wrapped by peft or not.
        which: Name (one of the config's ``task_names``) or id of the task; or a list, one for each row.

    Raises:
        AdapterError: No adapter on the model has such a task.

    Example:
        >>> with task(torch.nn.Linear(2, 2), "sst2"):
        ...     pass
    """
    routing = find(model)
    if routing is None:
        yield
        return
    told = [config for config in routing.configs.values() if config.num_tasks]
    for one in [which] if isinstance(which, (str, int)) else which:
        if told and not any(knows(config, one) for config in told):
            index_of(told[0], one)  # raises, with the names of the tasks
    here = routing._here
    token, before = _SET.set((*_SET.get(), (routing, which))), here.default
    here.default = which
    try:
        yield
    finally:
        here.default = before
        _SET.reset(token)


@contextmanager
def chosen_positions(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """The output head of a pass inside sees the tokens at these positions only, (n,), as one matrix (n, d).

    Args:
        model: The model.
        positions: In the batch flattened to rows times length.
    """
    routing = find(model)
    if routing is None:
        yield
        return
    before, routing._here.chosen = routing._here.chosen, positions
    try:
        yield
    finally:
        routing._here.chosen = before


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
    """What the layers add to the loss of the last forward pass (balance, alignment, z-loss), where it is not in it yet.

    Each adapter's is the mean over its layers, already weighted. A pass that was given ``labels`` has added it to the
    loss that the model returns; then, and for models and settings without such losses, this is 0.0. So one line is
    right in every training loop: ``loss = loss + multiflora.auxiliary_loss(model)``.

    Args:
        model: Any model, wrapped by peft or not.

    Raises:
        AdapterError: The model is training and the pass was made without gradients; nothing would be learned from it.

    Example:
        >>> auxiliary_loss(torch.nn.Linear(2, 2))
        0.0
    """
    routing = find(model)
    last = None if routing is None else routing._here.last
    if last is None or not last.losses:
        return 0.0
    if last.counted == "loss":
        return 0.0 if last.asked is None else last.asked
    last.counted = "asked"
    return total_of(last)


def configs_of(model: nn.Module) -> Mapping[str, Any]:
    """The configs of all multiflora adapters on a model, by adapter name; empty for any other model."""
    routing = find(model)
    return {} if routing is None else routing.configs
