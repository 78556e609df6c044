r"""How heads are blended: the gate :math:`g_h(x, \text{task})` of the one equation. One small value per kind.

A gate knows its parameters, how they start, and what each head's weight is. What it *reads* decides everything else:

=========  ==========================  ===========================================
reads      weights                     consequence
=========  ==========================  ===========================================
nothing    the same for every token    the update is one matrix: it merges exactly
task       one row per task            one matrix per task: merges for a given task
token      from the layer's input      no single matrix: does not merge
=========  ==========================  ===========================================

A gate on the token looks at the layer's input x, or at what the heads read of it, a few numbers a token (``of_stem``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multiflora import ops
from multiflora.methods.initial import kaiming_uniform, normal

Parts = Mapping[str, Tensor]
Reads = Literal["nothing", "task", "token"]
Times = Callable[[Tensor, Tensor], Tensor]
"""(a matrix of the layer's, tokens (n, T)) -> their product: of a mixture each expert has a matrix of its own."""
TOKEN_ROUTERS = ("router", "stem_router", "core_router")
"""Names of the tensors that look at a token."""


@dataclass(frozen=True)
class Gate:
    """The base of all gates; as it stands: every head has weight 1."""

    reads: Reads = "nothing"
    names: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters the gate owns."""
    of_stem: ClassVar[bool] = False
    """Whether it looks at what the heads read, A x, in place of x."""

    def shapes(self, config: Any, heads: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """The shape of each of them; d_in is the width of what the gate looks at."""
        return {}

    def look(self, parts: Parts, v: Tensor, heads: int, scale: float, times: Times) -> Tensor:
        """The logits, (H, T), of a gate that looks at what the heads read, v = s A x, (K r, T)."""
        raise NotImplementedError

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        """Fill the gate's parameters in place."""

    def fold(self, config: Any, parts: Parts, B: Tensor) -> Tensor:
        """Heads (d_out, H r) with whatever part of the gate is constant over tokens multiplied in."""
        return B

    def weights(self, config: Any, parts: Parts, logits: Tensor | None, tasks: Tensor | None) -> Tensor | None:
        """Weight of each head for each token, (H, T), at least float32, given logits (H, T) and tasks (T,).

        Tokens come last, as in :mod:`multiflora.ops.packed`. None means 1 for all.
        """
        return None

    def left_to_op(self, config: Any) -> bool:
        """Whether the weights are 1, or the softmax of the logits: what :func:`multiflora.ops.branches` does itself."""
        return self.reads == "nothing"

    def constant(self, config: Any, parts: Parts, heads: int, task: int | None) -> Tensor:
        """The weights (H,) where they do not depend on the token; only called for such gates."""
        return torch.ones(heads)


@dataclass(frozen=True)
class FixedGate(Gate):
    """A number that is the same for every head and never learned."""

    value: Callable[[Any], float] = lambda config: 1.0

    def fold(self, config: Any, parts: Parts, B: Tensor) -> Tensor:
        value = self.value(config)
        return B if value == 1 else B * value


@dataclass(frozen=True)
class ScaleGate(Gate):
    r"""MultiLoRA's learned scale: :math:`\operatorname{diag}(g_h) B_h`, with :math:`g_h` starting at 0.

    It acts on output features, so it is multiplied into the heads (d_out · H r numbers a step, not a token).
    """

    width: Callable[[Any, int], int] = lambda config, d_out: d_out
    names = ("scale",)

    def shapes(self, config: Any, heads: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"scale": (heads, self.width(config, d_out))}

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        if config.init_weights:
            torch.nn.init.zeros_(parts["scale"])
        else:
            normal(parts["scale"], 1.0, generator)

    def fold(self, config: Any, parts: Parts, B: Tensor) -> Tensor:
        scale = parts["scale"]
        heads = B.view(B.shape[0], scale.shape[0], -1)
        return (heads * scale.t().to(B.dtype).unsqueeze(-1)).view_as(B)


@dataclass(frozen=True)
class TokenRouter(Gate):
    r"""A linear router on the layer's input: :math:`g = \operatorname{softmax}(R x)`, in float32 at least.

    With ``sigmoid`` each head has a score of its own, and they are divided by their sum, as in SMoRA's published code
    (arXiv 2501.15103): :math:`g_h = \sigma(\ell_h) / \sum_j \sigma(\ell_j)`. It is the softmax of
    :math:`\log\sigma(\ell)`.

    With ``top_k`` the softmax goes over the k largest logits of each token and all other heads weigh 0, as in MixLoRA
    (arXiv 2404.15159, eq. 4). All heads are computed all the same: packed, they cost two small products, and picking
    rows apart for each token would cost more than it saves.
    """

    reads: Reads = "token"
    zero: Callable[[Any], bool] = lambda config: False
    std: Callable[[Any], float | None] = lambda config: None
    """Of a normal start; None: Kaiming-uniform."""
    top_k: Callable[[Any], int | None] = lambda config: config.top_k
    sigmoid: Callable[[Any], bool] = lambda config: False
    names = ("router",)

    def shapes(self, config: Any, heads: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {self.names[0]: (heads, d_in)}

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        router, std = parts[self.names[0]], self.std(config)
        if config.init_weights and self.zero(config):
            torch.nn.init.zeros_(router)
        elif config.init_weights and std is not None:
            normal(router, std, generator)
        else:
            kaiming_uniform(router, generator)

    def weights(self, config: Any, parts: Parts, logits: Tensor | None, tasks: Tensor | None) -> Tensor | None:
        assert logits is not None
        if self.sigmoid(config):
            logits = F.logsigmoid(_at_least_float32(logits))
        k = self.top_k(config)
        if k is not None:
            logits = logits.masked_fill(_left_out(logits, k), -torch.inf)
        return ops.softmax(logits)

    def left_to_op(self, config: Any) -> bool:
        return self.top_k(config) is None and not self.sigmoid(config)


@dataclass(frozen=True)
class StemRouter(TokenRouter):
    r"""A router on what the heads read: :math:`g = \operatorname{softmax}(R A x)`, R of (H, r), as in D²MoRA."""

    names = ("stem_router",)
    of_stem = True

    def look(self, parts: Parts, v: Tensor, heads: int, scale: float, times: Times) -> Tensor:
        return times(parts[self.names[0]], v) / scale

    def left_to_op(self, config: Any) -> bool:
        return False


@dataclass(frozen=True)
class LargestGate(Gate):
    r"""No router: the k heads whose own :math:`\lVert A_h x \rVert` is largest have weight 1, all others 0.

    With heads of rank 1 it is FlyLoRA's activation of ranks (arXiv 2510.08396): a head is a rank, and
    :math:`|a_h^\top x|` says whether it takes part. The choice itself has no gradient.
    """

    reads: Reads = "token"
    of_stem = True

    def look(self, parts: Parts, v: Tensor, heads: int, scale: float, times: Times) -> Tensor:
        by_head = _at_least_float32(v.detach()).view(heads, len(v) // heads, v.shape[1])
        length: Tensor = torch.linalg.vector_norm(by_head, dim=1)
        return length / scale

    def weights(self, config: Any, parts: Parts, logits: Tensor | None, tasks: Tensor | None) -> Tensor | None:
        assert logits is not None
        # a layer that has no more heads than take part
        return None if config.top_k is None else (~_left_out(logits, config.top_k)).to(logits.dtype)


@dataclass(frozen=True)
class TaskGate(Gate):
    """Weights looked up by the row's task; a subclass gives the table."""

    reads: Reads = "task"

    def table(self, config: Any, parts: Parts) -> Tensor:
        """Weights of each task's heads, (num_tasks, H)."""
        raise NotImplementedError

    def weights(self, config: Any, parts: Parts, logits: Tensor | None, tasks: Tensor | None) -> Tensor | None:
        assert tasks is not None
        # a table that all layers share may lie on another device
        return self.table(config, parts).to(tasks.device)[tasks].t()

    def constant(self, config: Any, parts: Parts, heads: int, task: int | None) -> Tensor:
        return self.table(config, parts)[task]


@dataclass(frozen=True)
class TaskEmbeddingGate(TaskGate):
    r"""MOELoRA's gate: :math:`g = \operatorname{softmax}(W e_t)` on a learned embedding of the task."""

    names = ("task_embedding", "task_router")

    def shapes(self, config: Any, heads: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        width = config.task_embedding_dim
        return {"task_embedding": (config.num_tasks, width), "task_router": (heads, width)}

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        normal(parts["task_embedding"], 1.0, generator)
        kaiming_uniform(parts["task_router"], generator)

    def table(self, config: Any, parts: Parts) -> Tensor:
        return torch.softmax(
            _at_least_float32(parts["task_embedding"]) @ _at_least_float32(parts["task_router"]).t(), -1
        )


@dataclass(frozen=True)
class TaskTemperatureGate(TaskGate):
    r"""MTL-LoRA's gate: :math:`g = \operatorname{softmax}(w_t / \tau)` on a learned row of each task."""

    names = ("task_logits",)

    def shapes(self, config: Any, heads: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"task_logits": (config.num_tasks, heads)}

    def start(self, config: Any, parts: Parts, generator: torch.Generator | None) -> None:
        kaiming_uniform(parts["task_logits"], generator)

    def table(self, config: Any, parts: Parts) -> Tensor:
        return torch.softmax(_at_least_float32(parts["task_logits"]) / config.temperature, -1)


def _left_out(logits: Tensor, k: int) -> Tensor:
    """Which of the logits, (H, T), are none of a token's k largest."""
    return torch.ones_like(logits, dtype=torch.bool).scatter(0, logits.topk(k, 0).indices, 0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
