"""Compile the kernels to machine code for NVIDIA's architectures 80 and 90, without a GPU; prints what was done."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multiflora.ops import triton_kernels

NUMBERS = dict.fromkeys(["tokens", "count", "u_row", "dz_row", "gate_row", "gate_token", "dropped"], "i32")
SIZES = {"RANK": 8, "HEADS": 5, "GATED": True, "DROPS": True, "ROWS": 8, "BLOCK": 128}


def build(kernel, item: str, constants: dict, architecture: int) -> None:
    gate = "*fp64" if item == "*fp64" else "*fp32"
    types = NUMBERS | {"seed": "i64", "gate": gate, "dgate": gate}
    signature = {
        name: "constexpr" if name in constants else types.get(name, item)  # the other pointers hold the compute type
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]


for architecture in (80, 90):
    for item, wide in (("*bf16", tl.float32), ("*fp64", tl.float64)):
        build(triton_kernels._kept_kernel, item, {"BLOCK": 1024}, architecture)
        for kernel in (triton_kernels._blend_kernel, triton_kernels._blend_backward_kernel):
            build(kernel, item, SIZES | {"WIDE": wide}, architecture)
    # own stems, no gate, no mask
    plain = SIZES | {"HEADS": 1, "GATED": False, "DROPS": False, "WIDE": tl.float32}
    none = {"gate": None, "gate_row": 0, "gate_token": 0}
    build(triton_kernels._blend_kernel, "*fp16", plain | none, architecture)
    build(triton_kernels._blend_backward_kernel, "*fp16", plain | none | {"dgate": None}, architecture)
    print(architecture)
