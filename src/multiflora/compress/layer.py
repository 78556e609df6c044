"""The layer that holds L, R and S in a linear layer's place, and how a model comes to have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiflora.compress.losparse import Averages, decompose, kept_rank
from multiflora.errors import ConfigError

__all__ = ["LoSparseLinear", "compressed_layers", "put_layers", "sparsify"]


class LoSparseLinear(nn.Module):
    """y = L (R x) + S x + b, S stored as the rows that are left of it.

    The factors may be float32 masters: they are cast to the input's dtype.

    Args:
        d_in: Inputs.
        d_out: Outputs.
        rank: k of L and R.
        rows: How many rows of S are left; all of them while training.
        bias: Whether there is one.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, rows: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.L, self.R = nn.Parameter(torch.empty(d_out, rank)), nn.Parameter(torch.empty(rank, d_in))
        self.S = nn.Parameter(torch.empty(rows, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.rows: Tensor
        self.importance: Tensor
        self.uncertainty: Tensor
        self.register_buffer("rows", torch.arange(rows))

    @classmethod
    def of(cls, linear: nn.Linear, rank: int) -> LoSparseLinear:
        """The layer that starts as a linear layer, its factors in float32, and that is ready to be trained."""
        d_out, d_in = linear.weight.shape
        with torch.device(linear.weight.device):
            made = cls(d_in, d_out, rank, d_out, bias=linear.bias is not None)
            # buffers, so that they are counted in the memory and move with the layer; no part of what is saved
            for name in Averages._fields:
                made.register_buffer(name, torch.zeros(d_out, d_in), persistent=False)
        with torch.no_grad():
            for part, value in zip(
                (made.L, made.R, made.S), decompose(linear.weight.detach().float(), rank), strict=True
            ):
                part.copy_(value)
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        low = F.linear(F.linear(x, self.R.to(x.dtype)), self.L.to(x.dtype), bias)
        sparse = F.linear(x, self.S.to(x.dtype)).to(low.dtype)
        return low + sparse if len(self.rows) == self.out_features else low.index_add(-1, self.rows, sparse)

    @property
    def averages(self) -> Averages:
        """The running means of S's importance, which a layer has while it is trained."""
        return Averages(self.importance, self.uncertainty)

    @averages.setter
    def averages(self, found: Averages) -> None:
        self.importance.copy_(found.importance)
        self.uncertainty.copy_(found.uncertainty)

    def slim(self) -> None:
        """Drop the rows of S that are zero; the training is over."""
        kept = self.S.detach().any(1).nonzero().flatten()
        self.rows = self.rows[kept]
        self.S = nn.Parameter(self.S.detach()[kept].clone())
        for name in Averages._fields:
            self._buffers.pop(name, None)

    def dense(self) -> Tensor:
        """The weight it stands for, L R + S, (d_out, d_in)."""
        return (self.L @ self.R).index_add(0, self.rows, self.S)

    def numbers(self) -> int:
        """How many numbers it stores."""
        return sum(part.numel() for part in self.parameters())


def compressed_layers(model: nn.Module) -> dict[str, LoSparseLinear]:
    """Every layer in this form, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoSparseLinear)}


def sparsify(model: Any, low_rank: float) -> None:
    """Put L R + S in place of every linear layer but the output head; these are trained, all else is frozen.

    Raises:
        ConfigError: There is no linear layer besides the head.
    """
    head = model.get_output_embeddings()
    chosen = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head
    }
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no nn.Linear besides its output head; there is nothing to compress."
        )
    model.requires_grad_(False)
    made = {
        name: LoSparseLinear.of(linear, kept_rank(low_rank, *linear.weight.shape)) for name, linear in chosen.items()
    }
    put_layers(model, made)


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace modules by name."""
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
