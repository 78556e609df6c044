"""What one forward pass knows: its rows, their padding, and the task of each token that a layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multiflora.errors import AdapterError
from multiflora.task_ids import TaskName, Which, check_range, index_of

__all__ = ["Pass", "Side", "Tokens"]


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
        default: Tasks set by `multiflora.task`, for where none came with the batch.
        chosen: Positions that the output head sees, (n,), in the batch flattened to rows times length.
        learns: Whether the model was training.
        with_gradient: Whether gradients were on when the pass began.
        losses: What each adapter's layers add to the loss.
        counted: "loss" once they are in the model's own loss, "asked" once :func:`auxiliary_loss` has given them out.
        pull: The gradient of the loss by each adapter's layers, once it is known, where these had none in the pass.
        gates: The newest gates that the layers of a block share: adapter -> block and gate.
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
        self.gates: dict[str, tuple[str, Tensor]] = {}
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
            check_range(config, which if rows is None or which.dim() == 0 or len(which) == 1 else which[list(rows)])
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
    order: Tensor | None = None
    """Which token each of those is that the layer sees, (S,), where it sees some of them twice and in another order."""

    @property
    def num_tokens(self) -> int:
        """How many tokens the layer sees."""
        return self.lead.numel() if self.order is None else len(self.order)

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
        return self._ordered(self._rows(device))

    def _rows(self, device: torch.device) -> Tensor | None:
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
        found = self._keep()
        if found is None and self.order is not None:
            # of some rows there may be no token here: these look like rows of padding
            return torch.ones_like(self.order)
        return self._ordered(found)

    def _keep(self) -> Tensor | None:
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
        return self._ordered(self._tasks(config, device, only))

    def _tasks(self, config: Any, device: torch.device, only: Sequence[int] | None) -> Tensor | None:
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
        rows = self._rows(device)
        if rows is not None and (self.side.rows or len(self.lead) > 1 or tokens == self.batch == len(ids)):
            return ids[rows]
        if bool((ids == ids[0]).all()):
            return ids[:1].expand(tokens)
        raise AdapterError(
            f"{self.layer} sees {tokens} tokens of a batch of {self.batch} rows, and not in the order of the rows, as "
            "an expert does or a layer behind a choice of positions: which task each belongs to cannot be known. Give "
            "batches of one task, or leave the layer out of target_modules."
        )

    def _ordered(self, found: Tensor | None) -> Tensor | None:
        """What is known of each token of the batch, for those that the layer sees."""
        return found if found is None or self.order is None else found.to(self.order.device)[self.order]

    def _of_each(self, ids: Tensor) -> Tensor | None:
        """Ids of tokens, (rows, length), for the tokens that are here; None where these are others."""
        if self.chosen is not None:
            return ids.to(self.chosen.device).reshape(-1)[self.chosen]
        if self.lead == ids.shape or (self.lead == (ids.numel(),) and not self.shared_out):
            return ids.reshape(-1)
        return None
