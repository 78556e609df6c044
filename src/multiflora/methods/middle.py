r"""What stands between the stems and the heads: a small matrix M, of the row's task.

.. math:: v = M u, \qquad u = s\,[A_1; \dots; A_K]\,x

v is what the heads read. Tokens come last, as in :mod:`multiflora.ops.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from multiflora.methods.gates import Reads

__all__ = ["ONE_LAYER", "Made", "Middle", "TaskMatrix", "Where"]

Parts = Mapping[str, Tensor]


class Made(NamedTuple):
    """What the stems and the router made of a layer's tokens."""

    u: Tensor
    """s A x, (K r, T)."""
    logits: Tensor | None
    """R x, or None where no router reads x."""
    tasks: Tensor | None
    """Of each token, (T,), where they are needed."""
    scale: float
    """s."""


class Where(Protocol):
    """How a layer's small tensors are laid out: those of one layer, or of each of a mixture's experts."""

    def times(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        """A matrix, (m, n) for each of them, times tokens, (n, T)."""

    def rows(self, table: Tensor, tasks: Tensor) -> Tensor:
        """Each token's row of a table, (num_tasks, ...) for each of them."""


class _OneLayer:
    def times(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        return matrix.to(tokens.dtype) @ tokens

    def rows(self, table: Tensor, tasks: Tensor) -> Tensor:
        return table[tasks]


ONE_LAYER: Where = _OneLayer()


@dataclass(frozen=True)
class Middle:
    """The base of all: what a method needs to know of it."""

    reads: ClassVar[Reads]
    """What M depends on."""
    names: ClassVar[tuple[str, ...]]
    """Names of the parameters it owns."""

    def shapes(self, config: Any, rank: int, d_in: int) -> dict[str, tuple[int, ...]]:
        """The shape of each of them."""
        raise NotImplementedError

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        """Fill them in place."""
        raise NotImplementedError

    def read(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor:
        """v, (r, T)."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaskMatrix(Middle):
    """A matrix (or diagonal) per task, as in MTL-LoRA: M_t of (r, r). The identity at the start."""

    reads = "task"
    names = ("task_matrix",)

    def shapes(self, config: Any, rank: int, d_in: int) -> dict[str, tuple[int, ...]]:
        return {"task_matrix": (config.num_tasks, *matrix_shape(config.task_matrix, rank))}

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        identities(parts["task_matrix"], config.task_matrix)

    def matrices(self, config: Any, parts: Parts) -> Tensor:
        """One full matrix per task, (num_tasks, r, r)."""
        return full(parts["task_matrix"], config.task_matrix)

    def read(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor:
        assert made.tasks is not None
        matrices = where.rows(self.matrices(config, parts), made.tasks).to(made.u.dtype)
        return (matrices @ made.u.t().unsqueeze(-1)).squeeze(-1).t().contiguous()


def matrix_shape(kind: str, rank: int) -> tuple[int, ...]:
    """(r, r), or (r,) of a diagonal."""
    return (rank, rank) if kind == "full" else (rank,)


def full(stored: Tensor, kind: str) -> Tensor:
    """Matrices, (..., r, r), of matrices or diagonals."""
    return stored if kind == "full" else torch.diag_embed(stored)


def identities(stored: Tensor, kind: str) -> None:
    """Fill matrices or diagonals with the identity."""
    if not stored.is_meta:
        with torch.no_grad():
            stored.copy_(torch.eye(stored.shape[-1]).expand_as(stored) if kind == "full" else stored.fill_(1.0))
