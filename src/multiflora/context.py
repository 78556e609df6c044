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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from multiflora.errors import AdapterError

TaskName = str | int
Which = TaskName | Sequence[TaskName]

_IGNORED = -100

# the tasks set by `task` in this thread or coroutine: (routing, which), the innermost last
_SET: ContextVar[tuple[tuple[Routing, Which], ...]] = ContextVar("multiflora_task", default=())

_PASSES = itertools.count()


class Recorder(Protocol):
    """Something that wants to see every gate, such as a routing monitor."""

    def __call__(self, layer: str, gate: Tensor, tasks: Tensor | None) -> None:
        """Take a layer's gate, (T, H), without gradient, and the task of each token, (T,) or None."""


class Side(NamedTuple):
    """The tokens of one stack of layers: of the whole model, or of an encoder or decoder."""

    rows: int | None = None
    """Of the batch; None where nobody told."""
    length: int | None = None
    """Tokens of a row; None where rows are single vectors."""
    mask: Tensor | None = None
    """1 for text and 0 for fill, (rows, length) or longer in front, by what a cache holds."""


class Pass:
    """What one forward pass knows, and what its layers reported.

    Attributes:
        main: The tokens of the model, or of its encoder.
        decoder: Those of the decoder, where that has tokens of its own.
        memory: The encoder's states, as the decoder's layers may see them.
        pictures: Whether the input is no text: rows may be cut into windows, which lie together.
        ids: Tasks of the rows, or of the tokens, as they came with the batch.
        default: Tasks set by :func:`task`, for where none came with the batch.
        chosen: Positions that the output head sees, (n,), in the batch flattened to rows times length.
        learns: Whether the model was training.
        with_gradient: Whether gradients were on when the pass began.
        losses: What each adapter's layers add to the loss.
        counted: "loss" once they are in the model's own loss, "asked" once :func:`auxiliary_loss` has given them out.
        pull: The gradient of the loss by each adapter's layers, once it is known, where these had none in the pass.
        asked: What :func:`auxiliary_loss` gives out of losses that are in the model's loss.
        reached: Whether a gradient came to them, where they are.
        went_back: Whether a gradient was taken through the pass.
        opener: The module whose call it is, until that is over.
        number: Of the pass, or of the one whose cache it goes on with; later ones have larger numbers.
    """

    def __init__(self, default: Which | None, opener: nn.Module | None = None) -> None:
        self.main = Side()
        self.decoder: Side | None = None
        self.memory: Tensor | None = None
        self.pictures = False
        self.ids: Tensor | Sequence[TaskName] | None = None
        self.default = default
        self.chosen: Tensor | None = None
        self.learns = self.with_gradient = False
        self.losses: dict[str, list[Tensor]] = {}
        self.counted = ""
        self.pull: dict[str, Tensor] = {}
        self.asked: Tensor | None = None
        self.reached: list[Tensor] = []
        self.went_back = False
        self.opener = opener
        self.number = -1
        self._one: dict[int, int | None] = {}
        self._resolved: dict[int, Tensor | None] = {}

    def ids_for(self, config: Any, rows: Sequence[int] | None = None) -> Tensor | None:
        """The ids by one adapter's own list of tasks, (), (rows,) or (rows, length); None where none is known.

        Args:
            config: The adapter's.
            rows: The rows that the adapter serves, in a batch of several adapters; None: all.
        """
        if rows is not None:
            return self._resolve(config, rows)
        if id(config) not in self._resolved:
            self._resolved[id(config)] = self._resolve(config, None)
        return self._resolved[id(config)]

    def one_task(self, config: Any, rows: Sequence[int] | None = None) -> int | None:
        """The one task of all rows by an adapter's own list, or None where there are several or none is known.

        Args:
            config: The adapter's.
            rows: The rows that the adapter serves, in a batch of several adapters, of which it may know the others'
                tasks not at all: then None, too, unless one id was given for all rows. None: all rows.
        """
        if rows is not None:
            ids = self.ids_for(config, rows)
            return int(ids) if ids is not None and ids.numel() == 1 else None
        if id(config) not in self._one:
            ids = self.ids_for(config)
            first = None if ids is None or not ids.numel() else int(ids.reshape(-1)[0])
            same = ids is not None and first is not None and bool(torch.eq(ids, first).all())
            self._one[id(config)] = first if same else None
        return self._one[id(config)]

    def _resolve(self, config: Any, rows: Sequence[int] | None) -> Tensor | None:
        which = self.ids if self.ids is not None else self.default
        if which is None:
            return torch.tensor(0) if config.num_tasks == 1 else None
        if isinstance(which, Tensor):
            _check_range(config, which if rows is None or which.dim() == 0 or len(which) == 1 else which[list(rows)])
            return which
        if config.num_tasks is None and self.ids is None:
            return None  # an adapter that was told of no tasks
        if isinstance(which, (str, int)):
            return torch.tensor(index_of(config, which))
        wanted = set(range(len(which)) if rows is None or len(which) == 1 else rows)
        return torch.tensor([index_of(config, one) if i in wanted else 0 for i, one in enumerate(which)])


class Tokens(NamedTuple):
    """The tokens that one layer sees in one pass.

    Rows and tasks are known where the tokens come in the order of the batch: as (rows, ..., d), as all tokens one
    after another, (rows times length, d), as one vector for each row, or at the positions that were chosen for the
    output head. The tokens of an expert are in no order that anybody could know.
    """

    passed: Pass
    layer: str
    side: Side
    lead: torch.Size
    chosen: Tensor | None = None
    shared_out: bool = False
    """Whether the layer is an expert: one of several that share the tokens out among themselves."""
    listed: bool = False
    """Whether it is in any list of modules, as no layer behind a pooling is."""

    @property
    def batch(self) -> int:
        """How many rows the batch has."""
        if self.side.rows:
            return self.side.rows
        return self.lead[0] if self.lead else 1

    def _all(self) -> bool:
        """Whether all tokens of all rows are here, a row's one after another."""
        rows, length = self.batch, self.side.length
        if length is None:
            return self.lead == (rows,)
        return self.lead == (rows, length) or (self.lead == (rows * length,) and not self.shared_out)

    def rows(self, device: torch.device) -> Tensor | None:
        """The row of each token, (T,), or None where that cannot be known."""
        rows, tokens = self.batch, self.lead.numel()
        if rows == 1:
            return torch.zeros(tokens, dtype=torch.long, device=device)
        if self.chosen is not None and self.side.length:
            return torch.div(self.chosen.to(device), self.side.length, rounding_mode="floor")
        pooled = self.side.length not in (None, 1)
        one_each = self.lead == (rows,) and not (self.listed if pooled else self.shared_out)
        in_order = len(self.lead) > 1 and (
            self.lead[0] == rows or (self.passed.pictures and self.lead[0] % rows == 0 and tokens > 0)
        )
        if not (self._all() or one_each or in_order):
            return None
        return torch.arange(rows, device=device).repeat_interleave(tokens // rows)

    def keep(self) -> Tensor | None:
        """1 for real tokens and 0 for padding, (T,), or None where that is not known."""
        mask, length = self.side.mask, self.side.length
        if mask is None or length is None or mask.shape[0] != self.batch or mask.shape[1] < length:
            return None
        mask = mask[:, mask.shape[1] - length :].reshape(-1)
        if self.chosen is not None:
            return mask.to(self.chosen.device)[self.chosen]
        return mask if self._all() else None

    def tasks(self, config: Any, device: torch.device, only: Sequence[int] | None = None) -> Tensor | None:
        """The task of each token, (T,), or None where none is known.

        Args:
            config: The adapter's, which numbers the tasks.
            device: Of the result.
            only: The rows that the adapter serves, in a batch of several adapters; all tokens are given back.

        Raises:
            AdapterError: The rows have different tasks, and which tokens are whose cannot be known.
        """
        ids = self.passed.ids_for(config, only)
        if ids is None:
            return None
        tokens = self.lead.numel()
        if ids.numel() == 1:
            return ids.to(device).reshape(1).expand(tokens)
        if ids.dim() == 2:
            flat = self._of_each(ids)
            if flat is not None:
                return flat.to(device)
            if not bool((ids == ids[:, :1]).all()):
                raise AdapterError(
                    f"task_id has shape {tuple(ids.shape)}, which does not fit a layer input of shape "
                    f"{tuple(self.lead)} ({self.layer}). Give one id for each row, or for each token."
                )
            ids = ids[:, 0]
        if self.batch % len(ids):
            raise AdapterError(
                f"There are tasks for {len(ids)} rows, but the batch has {self.batch}. Give one task for all rows, or "
                "one for each."
            )
        # the copies of a row that beam search makes lie together
        ids = ids.to(device).repeat_interleave(self.batch // len(ids))
        rows = self.rows(device)
        if rows is not None and (self.side.rows or len(self.lead) > 1 or tokens == self.batch == len(ids)):
            return ids[rows]
        if bool((ids == ids[0]).all()):
            return ids[:1].expand(tokens)
        raise AdapterError(
            f"{self.layer} sees {tokens} tokens of a batch of {self.batch} rows, and not in the order of the rows, as "
            "an expert does or a layer behind a choice of positions: which task each belongs to cannot be known. Give "
            "batches of one task, or leave the layer out of target_modules."
        )

    def _of_each(self, ids: Tensor) -> Tensor | None:
        """Ids of tokens, (rows, length), for the tokens that are here; None where these are others."""
        if self.chosen is not None:
            return ids.to(self.chosen.device).reshape(-1)[self.chosen]
        if self.lead == ids.shape or (self.lead == (ids.numel(),) and not self.shared_out):
            return ids.reshape(-1)
        return None


class Routing:
    """What layers need to know about the batch, and what they report.

    Attributes:
        configs: Each adapter's config, by name.
        decoder_layers: Names of the adapted layers inside a decoder that has an encoder beside it.
        shared_out: Names of the adapted layers that stand beside others like them, which share the tokens out.
        listed: Names of the adapted layers inside any list of modules.
        holders: For each adapter with tensors that all its layers share, the layer that holds them.
        recorder: Called with every gate, or None.
        loop: Compute head by head (:func:`multiflora.ops.loop`) instead of packed.
    """

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}
        self.decoder_layers: frozenset[str] = frozenset()
        self.shared_out: frozenset[str] = frozenset()
        self.listed: frozenset[str] = frozenset()
        self.holders: dict[str, Any] = {}
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
        found.ids = None if ids is None else _checked(ids, found.main.rows)
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
        if not found.learns or output is None or not torch.is_grad_enabled():
            return None
        if found.losses:
            output = _with_loss(output, found, kwargs)
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
            if config is not None and (config.num_tasks or (found.ids is not None and not _numbers(found.ids))):
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
                y = _Pull.apply(y, loss, pull)  # type: ignore[no-untyped-call]
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
        return seen.keep() if seen is not None and seen.lead.numel() == tokens else None

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

    current: Pass | None = None
    """The pass that is running."""
    last: Pass | None = None
    """The newest one, running or over."""
    gone_back: tuple[int, Pass | None] = (-1, None)
    """Which pass a gradient has reached: number of the gradient's computation, and the pass."""
    default: Which | None = None
    """What `task` has set: for compiled code, which cannot read a context variable."""
    mixed: bool = False
    reporting: Tokens | None = None
    chosen: Tensor | None = None
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


def _with_loss(output: Any, found: Pass, kwargs: Mapping[str, Any]) -> Any:
    """The output with the layers' losses in its loss; as it was where it has none."""
    own = output.get("loss") if isinstance(output, Mapping) else None
    plain = isinstance(output, tuple) and kwargs.get("labels") is not None
    if plain:
        own = output[0]
    if not isinstance(own, Tensor) or own.numel() != 1 or not own.is_floating_point():
        return output
    found.counted = "loss"
    total = _total(found) * _share(kwargs)
    if not torch.compiler.is_compiling() and total.requires_grad:
        total, by_token, found.asked = _Once.apply(total, found)  # type: ignore[no-untyped-call]
        probs = output.get("log_probs") if isinstance(output, Mapping) else None
        if isinstance(probs, Tensor) and probs.requires_grad:
            output["log_probs"] = _ByToken.apply(probs, by_token, probs != 0)  # type: ignore[no-untyped-call]
    whole = own + total.to(own.device, own.dtype)
    if plain:
        return (whole, *output[1:])
    output["loss"] = whole
    return output


class _Once(torch.autograd.Function):
    """The losses for each way a training may take them, of which one counts: the first that a gradient comes by.

    These are the model's loss, the log-probabilities of trl's trainers, and what `auxiliary_loss` gives out, which adds
    nothing to the value of a loss that has them already.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, found: Pass) -> tuple[Tensor, Tensor, Tensor]:
        ctx.found = found
        ctx.set_materialize_grads(False)
        return total.clone(), total.clone(), torch.zeros_like(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        in_loss, by_token, asked = grads
        found = in_loss
        if found is None:
            found = asked if by_token is None else by_token
            if by_token is not None and asked is not None:
                found = torch.where(by_token == 0, asked, by_token)
        if found is not None:
            ctx.found.reached.append(found != 0)
        return found, None


class _ByToken(torch.autograd.Function):
    """Log-probabilities, (rows, length), of which a mean over tokens is a loss: the losses get the weight of that mean.

    So trl's SFTTrainer takes its loss. Any other use of them, as a preference has, weighs tokens differently, and then
    the losses get nothing.
    """

    @staticmethod
    def forward(ctx: Any, probs: Tensor, total: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.like = total.dtype, total.device
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        most, least = grad.masked_fill(~counts, -torch.inf).max(), grad.masked_fill(~counts, torch.inf).min()
        is_mean = (most < 0) & (most - least <= -1e-3 * least)
        pull = torch.where(is_mean, -(grad * counts).sum(), 0.0)
        dtype, device = ctx.like
        return grad, pull.to(device, dtype), None


def _share(kwargs: Mapping[str, Any]) -> Tensor | float:
    """The batch's part of a step that has several: by its labels, as the model's own loss counts them."""
    whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if whole is None or not isinstance(labels, Tensor):
        return 1.0
    own = (labels[..., 1:] != _IGNORED).sum()
    return own / torch.as_tensor(whole, device=own.device).clamp(min=1)


def _total(found: Pass) -> Tensor:
    """The mean over an adapter's layers, added up over adapters.

    Raises:
        AdapterError: They were computed without gradient although the model is training.
    """
    means: list[Tensor] = []
    for adapter, losses in found.losses.items():
        mean = torch.stack([one.to(losses[0].device) for one in losses]).mean()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not all(o.requires_grad for o in losses):
            if not found.with_gradient:
                raise AdapterError(
                    "The layers' losses carry no gradient although the model is training: the forward pass was made "
                    "without. Make it with gradients on (no torch.no_grad()), or leave auxiliary_loss out."
                )
            carrier = torch.zeros((), device=mean.device, requires_grad=True)
            carrier.register_hook(partial(_keep_pull, pull=found.pull, adapter=adapter, layers=len(losses)))  # type: ignore[no-untyped-call]
            mean = mean + carrier
        means.append(mean)
    return torch.stack([one.to(means[0].device) for one in means]).sum()


def _keep_pull(grad: Tensor, *, pull: dict[str, Tensor], adapter: str, layers: int) -> None:
    pull[adapter] = grad / layers


class _Pull(torch.autograd.Function):
    """y, whose gradient brings a layer's loss its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, pull: Tensor) -> Tensor:
        ctx.pull = pull.to(loss.device, loss.dtype)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.pull, None


def _numbers(ids: Any) -> bool:
    return isinstance(ids, Tensor) or not any(isinstance(one, str) for one in ids)


def _checked(ids: Any, rows: int | None) -> Tensor | Sequence[TaskName]:
    """What came as ``task_id``: names as they are, everything else as a tensor."""
    given: Tensor | Sequence[TaskName]
    if isinstance(ids, str):
        given = [ids]
    elif isinstance(ids, (list, tuple)) and any(isinstance(one, str) for one in ids):
        given = list(ids)
    else:
        given = ids if isinstance(ids, Tensor) else torch.as_tensor(ids)
        if given.is_floating_point() or given.dtype == torch.bool or given.dim() not in (0, 1, 2):
            raise AdapterError(
                f"task_id is a tensor of {given.dtype} with shape {tuple(given.shape)}; it must hold whole numbers, "
                "one for each row, (rows,), or for each token, (rows, length)."
            )
        given = given.long()
    number = len(given) if not isinstance(given, Tensor) or given.dim() else 1
    if rows and number != 1 and number != rows:
        shape = tuple(given.shape) if isinstance(given, Tensor) else (number,)
        raise AdapterError(
            f"task_id has shape {shape}, but the batch has {rows} rows. Give one id for each row, (rows,), or for each "
            "token, (rows, length)."
        )
    return given


def _check_range(config: Any, ids: Tensor) -> None:
    # on a GPU this check would wait for the device; the collator has made it there
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel() or not config.num_tasks:
        return
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.num_tasks:
        raise AdapterError(
            f"task_id goes from {int(ids.min())} to {int(ids.max())}, but the adapter has "
            f"{config.num_tasks} tasks ({_names(config)}). Give ids from 0 to {config.num_tasks - 1}."
        )


def _names(config: Any) -> str:
    return ", ".join(config.task_names) if config.task_names else f"0 to {(config.num_tasks or 0) - 1}"


def missing(config: Any) -> AdapterError:
    """The error for a method that needs tasks and got none."""
    if config.num_tasks is None:
        return AdapterError(
            f"{type(config).__name__}: num_tasks is None; a method gated by task, or with a loss between tasks, must "
            "know how many there are. Set num_tasks=N or task_names=[...]."
        )
    return AdapterError(
        f"A {config.method_name} adapter needs the task of each row, and none was given. Pass task_id=... with the "
        f"batch or use `with multiflora.task(model, TASK):`; its tasks are {_names(config)}."
    )


def _knows(config: Any, which: TaskName) -> bool:
    if isinstance(which, str):
        return which in (config.task_names or ())
    return config.num_tasks is None or 0 <= which < config.num_tasks


def index_of(config: Any, which: TaskName) -> int:
    """A task's id, from its name or id, checked against the config.

    Raises:
        AdapterError: There is no such task; the message lists those there are.
    """
    if _knows(config, which):
        return int(config.task_names.index(which)) if isinstance(which, str) else int(which)
    known = _names(config) if config.num_tasks else "not named in its config (set task_names)"
    raise AdapterError(f"The adapter has no task {which!r}; its tasks are {known}.")


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
        if told and not any(_knows(config, one) for config in told):
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
    return _total(last)


def configs_of(model: nn.Module) -> Mapping[str, Any]:
    """The configs of all multiflora adapters on a model, by adapter name; empty for any other model."""
    routing = find(model)
    return {} if routing is None else routing.configs
