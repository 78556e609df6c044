r"""The elementwise step :math:`z_h = g_h\,m_h \odot u_{\sigma(h)}` and its gradients in Triton, for CUDA tensors.

Torch needs a kernel for the mask, one for each product, and memory for what lies between. Here each direction is one
kernel, and the mask exists in registers only: element i of a mask is made from the seed and i by a counter-based
generator (Philox, which Triton brings), so the backward pass makes the same one.

They are tested against the functions of :mod:`multiflora.ops.packed` in Triton's interpreter, and compiled for NVIDIA's
architectures 80 and 90, but have not been run on a GPU yet. So torch does the step, unless ``MULTIFLORA_TRITON=1`` in
the environment asks for these: they stay only if they gain on a GPU (docs/decisions/0028).

The two products around this step are left to the BLAS library. A product with this step as its epilogue would save one
reading of u, r numbers a token beside the d_in of x; but u must be written all the same for the backward pass, and the
gate, which can be any torch expression of the logits, stands between.
"""

# Triton's language has no types for Python's checkers
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # a CPU build of torch comes without it; the kernels are never called then
    triton = None

    def jit(function: Any = None, **_: Any) -> Any:
        """Leave the kernel as it is, with settings or without."""
        return jit if function is None else function


__all__ = ["blend", "blend_backward", "kept", "serve"]

# elements that one program works on at a time: a few for each thread
_TILE = 1024
_SWITCH = "MULTIFLORA_TRITON"


def serve(device: torch.device | str) -> bool:
    """Whether tensors of this device are for these kernels: CUDA, triton is there, and somebody asked for them."""
    return triton is not None and torch.device(device).type == "cuda" and os.environ.get(_SWITCH) == "1"


# ---- what runs on the device ----------------------------------------------------------------------------------------


@jit
def _is_kept(seed, index, dropped):
    """16 random bits against a threshold, as in :mod:`multiflora.ops.mask`."""
    return (tl.randint(seed, index) & 0xFFFF) >= dropped


@jit
def _survivor_weight(dropped, WIDE: constexpr):
    # not an argument: a number from Python would come in single precision
    return 65536.0 / (65536 - dropped).to(WIDE)


@jit(do_not_specialize=["seed", "dropped"])
def _kept_kernel(out, count, seed, dropped, BLOCK: constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keeps = tl.where(_is_kept(seed, index, dropped), 1.0, 0.0)
    tl.store(out + index, keeps.to(out.dtype.element_ty), mask=index < count)


@jit(do_not_specialize=["seed", "dropped"])
def _blend_kernel(
    u,
    gate,
    z,
    tokens,
    u_row,
    gate_row,
    gate_token,
    seed,
    dropped,
    RANK: constexpr,
    HEADS: constexpr,
    GATED: constexpr,
    DROPS: constexpr,
    WIDE: constexpr,
    ROWS: constexpr,
    BLOCK: constexpr,
):
    """One program: one stem, a block of its tokens, all heads on it (HEADS of them)."""
    stem = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    there = token < tokens
    inside = (row < RANK)[:, None] & there[None, :]
    value = tl.load(u + (stem * RANK + row)[:, None] * u_row + token[None, :], mask=inside, other=0.0).to(WIDE)
    weight = _survivor_weight(dropped, WIDE)
    for number in range(HEADS):
        head = stem * HEADS + number
        # 64 bits: heads, rank and tokens together may pass 2^31
        place = (head * RANK + row)[:, None].to(tl.int64) * tokens + token[None, :]
        result = value
        if GATED:
            g = tl.load(gate + head * gate_row + token * gate_token, mask=there, other=0.0).to(WIDE)
            result = result * g[None, :]
        if DROPS:
            result = tl.where(_is_kept(seed, place, dropped), result * weight, 0.0)
        tl.store(z + place, result.to(z.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["seed", "dropped"])
def _blend_backward_kernel(
    dz,
    u,
    gate,
    du,
    dgate,
    z,
    tokens,
    dz_row,
    u_row,
    gate_row,
    gate_token,
    seed,
    dropped,
    RANK: constexpr,
    HEADS: constexpr,
    GATED: constexpr,
    DROPS: constexpr,
    WIDE: constexpr,
    ROWS: constexpr,
    BLOCK: constexpr,
):
    """The programs are those of the forward kernel, so the sum over a stem's heads stays in registers."""
    stem = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    there = token < tokens
    inside = (row < RANK)[:, None] & there[None, :]
    value = tl.load(u + (stem * RANK + row)[:, None] * u_row + token[None, :], mask=inside, other=0.0).to(WIDE)
    weight = _survivor_weight(dropped, WIDE)
    total = tl.zeros((ROWS, BLOCK), WIDE)
    for number in range(HEADS):
        head = stem * HEADS + number
        place = (head * RANK + row)[:, None].to(tl.int64) * tokens + token[None, :]
        grad = tl.load(dz + (head * RANK + row)[:, None] * dz_row + token[None, :], mask=inside, other=0.0).to(WIDE)
        result = value
        if DROPS:
            keeps = _is_kept(seed, place, dropped)
            grad = tl.where(keeps, grad * weight, 0.0)
            result = tl.where(keeps, result * weight, 0.0)
        if GATED:
            g = tl.load(gate + head * gate_row + token * gate_token, mask=there, other=0.0).to(WIDE)
            # the mask is in grad already
            change = tl.sum(grad * value, 0)
            tl.store(dgate + head * tokens + token, change.to(dgate.dtype.element_ty), mask=there)
            grad = grad * g[None, :]
            result = result * g[None, :]
        total += grad
        tl.store(z + place, result.to(z.dtype.element_ty), mask=inside)
    out = (stem * RANK + row)[:, None] * tokens + token[None, :]
    tl.store(du + out, total.to(du.dtype.element_ty), mask=inside)


# ---- what calls it --------------------------------------------------------------------------------------------------


def kept(shape: tuple[int, ...], dropped: int, seed: int, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """1 for what a mask keeps and 0 for what it drops; see :func:`multiflora.ops.mask.kept`.

    Args:
        shape: Of the mask.
        dropped: How many of 2^16 elements are dropped in expectation.
        seed: The same seed gives the same mask, here and in the other kernels.
        device: Where it is made.
        dtype: Its type.
    """
    out = torch.empty(shape, device=device, dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(out):
            _kept_kernel[(triton.cdiv(out.numel(), _TILE),)](out, out.numel(), seed, dropped, BLOCK=_TILE)
    return out


def blend(u: Tensor, gate: Tensor | None, *, heads: int, rank: int, dropped: int, seed: int) -> Tensor:
    """:func:`multiflora.ops.blend` with the mask made on the way.

    Args:
        u: (K r, T).
        gate: (H, T) or None for 1.
        heads: H.
        rank: r.
        dropped: How many of 2^16 elements the mask drops in expectation; 0 for no mask.
        seed: The mask's.

    Returns:
        z, (H r, T), in u's dtype; products are rounded once, where torch rounds after each.
    """
    u = _tokens_inside(u)
    z = u.new_empty(heads * rank, u.shape[1])
    if z.numel():
        grid, strides, sizes = _launch(u, gate, heads, rank, dropped)
        with torch.cuda.device_of(u):
            _blend_kernel[grid](u, gate, z, u.shape[1], u.stride(0), *strides, seed, dropped, **sizes)
    return z


def blend_backward(
    dz: Tensor, u: Tensor, gate: Tensor | None, *, heads: int, rank: int, dropped: int, seed: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`multiflora.ops.elementwise.blend_backward` with the mask made on the way.

    Args:
        dz: The gradient of z, (H r, T).
        u: As given to :func:`blend`; so are the others.
        gate: See there.
        heads: H.
        rank: r.
        dropped: See there.
        seed: See there.

    Returns:
        The gradient of u, (K r, T); that of the gate, (H, T), or None; z, (H r, T).
    """
    dz, u = _tokens_inside(dz), _tokens_inside(u)
    tokens = u.shape[1]
    du, z = u.new_empty(u.shape), u.new_empty(heads * rank, tokens)
    dgate = None if gate is None else gate.new_empty(heads, tokens)
    if z.numel():
        grid, strides, sizes = _launch(u, gate, heads, rank, dropped)
        rows = (dz.stride(0), u.stride(0))
        with torch.cuda.device_of(u):
            _blend_backward_kernel[grid](dz, u, gate, du, dgate, z, tokens, *rows, *strides, seed, dropped, **sizes)
    return du, dgate, z


def _tokens_inside(tensor: Tensor) -> Tensor:
    """The kernels take any distance between rows, but tokens must lie side by side."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _launch(
    u: Tensor, gate: Tensor | None, heads: int, rank: int, dropped: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """The programs of both kernels, the gate's strides, and what the kernels are compiled for."""
    stems, rows = len(u) // rank, triton.next_power_of_2(rank)
    block = max(16, _TILE // rows)
    sizes = {
        "RANK": rank,
        "HEADS": heads // stems,
        "GATED": gate is not None,
        "DROPS": dropped > 0,
        "WIDE": tl.float64 if u.dtype == torch.float64 else tl.float32,
        "ROWS": rows,
        "BLOCK": block,
    }
    return (triton.cdiv(u.shape[1], block), stems), (0, 0) if gate is None else gate.stride(), sizes
