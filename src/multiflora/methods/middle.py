r"""What stands between the stems and the heads: a small matrix M, of the row's task or of the token.

.. math:: v = M u, \qquad u = s\,[A_1; \dots; A_K]\,x

v is what the heads read. There are three kinds of M; w is the softmax of a router:

=============  ========================================================  ===================================
kind           M                                                         as in
=============  ========================================================  ===================================
TaskMatrix     :math:`M_t`                                               MTL-LoRA
RoutedMatrix   :math:`\sum_i w_i(A x)\, M_i`                             CoMoL, whose M_i are core matrices
StemBlend      :math:`[w_1(x) I \mid \dots \mid w_K(x) I]`               D²MoRA: :math:`\sum_i w_i A_i x`
=============  ========================================================  ===================================

Tokens come last, as in :mod:`multiflora.ops.packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from multiflora.methods.gates import Reads, StemRouter, TokenRouter

__all__ = ["ONE_LAYER", "CoreRouter", "Made", "Middle", "RoutedMatrix", "StemBlend", "TaskMatrix", "Where"]

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

    def of_task(self, table: Tensor, tasks: Tensor) -> Tensor:
        """Each token's row of a table, (num_tasks, ...) for each of them."""


class _OneLayer:
    def times(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        return matrix.to(tokens.dtype) @ tokens

    def of_task(self, table: Tensor, tasks: Tensor) -> Tensor:
        return table[tasks]


ONE_LAYER: Where = _OneLayer()


@dataclass(frozen=True)
class Middle:
    """The base of all: what a method needs to know of it."""

    reads: ClassVar[Reads]
    """What M depends on."""
    names: ClassVar[tuple[str, ...]]
    """Names of the parameters it owns."""

    def stems(self, config: Any) -> int:
        """How many stems there are, K."""
        return 1

    def shapes(self, config: Any, rank: int, d_in: int) -> dict[str, tuple[int, ...]]:
        """The shape of each of them."""
        raise NotImplementedError

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        """Fill them in place."""
        raise NotImplementedError

    def read(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor:
        """v, (r, T)."""
        raise NotImplementedError

    def weights(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor | None:
        """w, (n, T); None where M does not depend on the token."""
        return None

    def constant(self, config: Any, parts: Parts, task: int | None, weights: Tensor | None) -> Tensor:
        """M, (r, K r), of a task, or of the given weights, (n,), in place of the token's; None: all alike."""
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
        matrices = where.of_task(self.matrices(config, parts), made.tasks).to(made.u.dtype)
        return (matrices @ made.u.t().unsqueeze(-1)).squeeze(-1).t().contiguous()

    def constant(self, config: Any, parts: Parts, task: int | None, weights: Tensor | None) -> Tensor:
        return self.matrices(config, parts)[task]


@dataclass(frozen=True)
class CoreRouter(StemRouter):
    """The router that blends core matrices: it looks at A x."""

    names = ("core_router",)


@dataclass(frozen=True)
class RoutedMatrix(Middle):
    r"""Core matrices (or diagonals) that a router on A x blends for each token, as in CoMoL (arXiv 2603.00573):

    .. math:: v = \sum_i \operatorname{softmax}(R_c A x)_i\, M_i A x

    All products :math:`M_i A x` are one, and then blended: N r numbers a token, where the blended matrix would be r².
    The matrices start as identities; the router tells them apart.
    """

    router: CoreRouter

    reads = "token"
    names = ("core", "core_router")

    def shapes(self, config: Any, rank: int, d_in: int) -> dict[str, tuple[int, ...]]:
        number = config.num_cores
        return {"core": (number, *matrix_shape(config.core, rank)), **self.router.shapes(config, number, rank, 0)}

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        identities(parts["core"], config.core)
        self.router.start(config, parts, generator)

    def weights(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor | None:
        logits = self.router.look(parts, made.u, config.num_cores, made.scale, where.times)
        return self.router.weights(config, parts, logits, None)

    def read(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor:
        products = where.times(full(parts["core"], config.core).flatten(-3, -2), made.u)
        return blended(products, self.weights(config, parts, made, where))

    def constant(self, config: Any, parts: Parts, task: int | None, weights: Tensor | None) -> Tensor:
        cores = full(parts["core"], config.core)
        merged: Tensor = torch.tensordot(alike(weights, cores), cores, 1)
        return merged


@dataclass(frozen=True)
class StemBlend(Middle):
    r"""Several stems that a router on x blends into one, as in D²MoRA's published code:

    .. math:: v = \sum_i \operatorname{softmax}(R x)_i\, A_i x
    """

    router: TokenRouter
    number: Callable[[Any], int]

    reads = "token"
    names = ("router",)

    def stems(self, config: Any) -> int:
        return self.number(config)

    def shapes(self, config: Any, rank: int, d_in: int) -> dict[str, tuple[int, ...]]:
        return self.router.shapes(config, self.number(config), d_in, 0)

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        self.router.start(config, parts, generator)

    def weights(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor | None:
        return self.router.weights(config, parts, made.logits, None)

    def read(self, config: Any, parts: Parts, made: Made, where: Where) -> Tensor:
        return blended(made.u, self.weights(config, parts, made, where))

    def constant(self, config: Any, parts: Parts, task: int | None, weights: Tensor | None) -> Tensor:
        number = self.number(config)
        eye = torch.eye(len(parts["A"]) // number, dtype=parts["A"].dtype, device=parts["A"].device)
        return torch.cat([weight * eye for weight in alike(weights, eye.expand(number, -1, -1))], 1)


def blended(several: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum, (r, T), of several vectors of each token, (n r, T), with weights (n, T)."""
    assert weights is not None
    each = several.view(len(weights), len(several) // len(weights), several.shape[1])
    return (each * weights.to(several.dtype).unsqueeze(1)).sum(0)


def alike(weights: Tensor | None, several: Tensor) -> Tensor:
    """The weights, (n,), of several tensors, (n, ...); None: each the same."""
    number = len(several)
    return several.new_full((number,), 1 / number) if weights is None else weights.to(several.device, several.dtype)


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
