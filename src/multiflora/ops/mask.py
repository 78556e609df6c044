"""Dropout masks that a seed brings back: the backward pass keeps eight bytes instead of a mask.

A mask is drawn once in the forward pass and once more, from the same seed, in the backward pass. The seed itself comes
from torch's global CPU generator, which gradient checkpointing saves and restores, so a recomputed block sees its masks
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from multiflora.ops import triton_kernels

Dropout = tuple[float, int]
"""Probability and seed of a mask."""

# Bernoulli draws compare 16 random bits with a threshold: four draws for one 64-bit random number, several times
# faster on a CPU than a float each. The drop rate is then a multiple of 2^-16; survivors are scaled by the exact one.
_LEVELS = 1 << 16


def draw_seed() -> int:
    """A fresh seed from torch's global CPU generator (so ``torch.manual_seed`` decides every mask).

    Under ``torch.compile`` it is 0 and not used: a compiled graph has dropout of its own.
    """
    if torch.compiler.is_compiling():
        return 0
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def dropout_mask(
    shape: tuple[int, ...],
    p: float,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Inverted-dropout mask :math:`m/(1-p)`, :math:`m \sim \mathrm{Bernoulli}(1-p)` element by element.

    Args:
        shape: Shape of the mask.
        p: Probability of a zero, in [0, 1); rounded to the nearest multiple of 2^-16.
        seed: The same seed gives the same mask on the same kind of device.
        device: Where the mask is made.
        dtype: Its type; the values are 0 and 1/(1-p).

    Returns:
        A tensor whose mean is 1 in expectation.

    Example:
        >>> dropout_mask((4,), 0.5, seed=1).unique().tolist()
        [0.0, 2.0]
    """
    return kept(shape, p, seed, device=device, dtype=dtype).mul_(survivor_weight(p))


def survivor_weight(p: float) -> float:
    """What the elements that a mask keeps are multiplied with: 1/(1-p), for the p that is really drawn."""
    return _LEVELS / (_LEVELS - dropped_levels(p))


def kept(
    shape: tuple[int, ...], p: float, seed: int, *, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Tensor:
    """The mask of :func:`dropout_mask` without its weight: 1 for what is kept, 0 for what is dropped."""
    if triton_kernels.serve(device):
        return triton_kernels.kept(shape, dropped_levels(p), seed, device=device, dtype=dtype)
    if torch.device(device).type == "cpu":
        return _compared(_draws(_generator(seed), shape), p, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    fresh = torch.empty(_words(shape), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return _compared(fresh.view(torch.int16)[..., : shape[-1]], p, dtype)


def kept_by_block(
    shape: tuple[int, ...], p: float, seed: int, rows: int, *, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Iterator[Tensor]:
    """The mask of :func:`kept`, so many rows at a time. A GPU, which has little to gain, makes one block of all.

    Example:
        >>> [len(block) for block in kept_by_block((5, 3), 0.5, 1, rows=2, dtype=torch.int32)]
        [2, 2, 1]
    """
    if torch.device(device).type != "cpu" or triton_kernels.serve(device):
        yield kept(shape, p, seed, device=device, dtype=dtype)
        return
    generator = _generator(seed)
    for start in range(0, shape[0], rows):
        yield _compared(_draws(generator, (min(rows, shape[0] - start), *shape[1:])), p, dtype)


def _words(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Four draws a word; the last axis is rounded up to whole words."""
    return *shape[:-1], (shape[-1] + 3) // 4


def _generator(seed: int) -> np.random.SFC64:
    """Numpy's generators make a word in half the time of torch's."""
    return np.random.SFC64(cast("np.random.SeedSequence", _AsItIs(seed)))


def _draws(generator: np.random.SFC64, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(generator.random_raw(_words(shape)).view(np.int16))[..., : shape[-1]]


def _compared(draws: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    # in place: an int16 of 0 or 1 becomes a float faster than a bool does
    return draws.ge_(dropped_levels(p) - _LEVELS // 2).to(dtype)


class _AsItIs(np.random.bit_generator.ISeedSequence):
    """A seed for SFC64, which mixes it itself; numpy's own hashing would cost more than a small mask.

    SFC64 takes any such object; numpy's annotation names only its own class of them.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return np.full(n_words, self.seed, dtype)


def dropped_levels(p: float) -> int:
    """How many of the 2^16 values of a draw drop an element."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def head_mask(
    tokens: int,
    heads: int,
    rank: int,
    p: float,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The mask on each head's input, (H, r, T): tokens last, as all small tensors of :mod:`multiflora.ops.packed`.

    Example:
        >>> head_mask(6, 2, 3, 0.5, seed=1).shape
        torch.Size([2, 3, 6])
    """
    return dropout_mask((heads, rank, tokens), p, seed, device=device, dtype=dtype)
