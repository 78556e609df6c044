"""Flags that any process may raise, and that all of them see at the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Agreement"]

T = TypeVar("T")

# far longer than any step: it must not be what ends a run whose first step compiles or downloads
_PATIENCE = timedelta(hours=24)


class Agreement:
    """Brings the processes of a run to one mind about a few yes-or-no questions, on the CPU.

    A signal reaches each process at a moment of its own, and a bad number shows in one before the others. If one
    stopped while another went on, the other would wait for it for ever. No device is waited for: an exchange is started
    at the end of one step and read at the end of the next.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None
        self._waiting: tuple[Tensor, Any] | None = None

    @property
    def delayed(self) -> bool:
        """Whether `later` answers with the flags of the step before."""
        return self._group is not None

    def later(self, flags: Sequence[bool]) -> list[bool]:
        """Hand in a step's flags, and return those that any process handed in a step ago; alone: these.

        Args:
            flags: As many in every process and at every step.
        """
        if self._group is None:
            return list(flags)
        before = self._collect(len(flags))
        mine = torch.tensor(flags, dtype=torch.uint8)
        self._waiting = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def now(self, flags: Sequence[bool]) -> list[bool]:
        """Hand in flags and wait for all processes; what was under way counts as well."""
        if self._group is None:
            return list(flags)
        before = self._collect(len(flags))
        mine = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group)
        return [bool(a) or b for a, b in zip(mine.tolist(), before, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of the processes; only when all have agreed to ask."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Let the first process make a value while the others wait, and return it in all of them."""
        if self._group is None:
            return make()
        values: list[Any] = [make() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(values, src=0, group=self._group)
        found: T = values[0]
        return found

    def _collect(self, number: int) -> list[bool]:
        if self._waiting is None:
            return [False] * number
        flags, work = self._waiting
        self._waiting = None
        work.wait()
        return [bool(flag) for flag in flags.tolist()]
