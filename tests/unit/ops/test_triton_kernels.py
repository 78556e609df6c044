"""The kernels against the torch functions they stand in for, in Triton's interpreter (on a GPU: TRITON_INTERPRET=0)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from multiflora import ops
from multiflora.ops import elementwise, native, triton_kernels
from multiflora.ops.mask import dropped_levels, survivor_weight

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET is off and there is no GPU", allow_module_level=True)

SEED = 2**40 + 5
# products are rounded once here and after each factor there; the interpreter cuts bfloat16 off in place of rounding
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
# stems, heads, rank, tokens: shared and own stems, sizes that fill no block, the degenerate ends
SIZES = [(1, 5, 8, 33), (3, 3, 5, 70), (1, 1, 1, 1), (2, 2, 3, 0)]


@pytest.fixture
def on_kernels(monkeypatch):
    """As if every tensor lay on a GPU."""
    monkeypatch.setattr(triton_kernels, "serve", lambda device: True)
    monkeypatch.setattr(native, "serve", lambda x: None)


def tensors(stems, heads, rank, tokens, dtype, gated):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # u as `stems` gives it: some rows of a larger tensor
    u = make(stems * rank + 2, tokens).to(DEVICE, dtype)[: stems * rank]
    gate = make(tokens, heads).to(DEVICE, torch.promote_types(dtype, torch.float32)).t() if gated else None
    return u, gate, make(heads * rank, tokens).to(DEVICE, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", CLOSE)
def test_equals_torch_in_values_and_gradients(dtype, sizes, gated, p):
    _, heads, rank, tokens = sizes
    u, gate, dz = tensors(*sizes, dtype, gated)
    mask, dropped = None, dropped_levels(p)
    if p:
        mask = triton_kernels.kept((heads, rank, tokens), dropped, SEED, device=DEVICE, dtype=dtype)
        mask = mask * survivor_weight(p)
    words = {"heads": heads, "rank": rank}
    z = triton_kernels.blend(u, gate, **words, dropped=dropped, seed=SEED)
    torch.testing.assert_close(z, elementwise.blend(u, gate, mask, **words), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    ours = triton_kernels.blend_backward(dz, u, gate, **words, dropped=dropped, seed=SEED)
    theirs = elementwise.blend_backward(dz, u, gate, mask, **words)
    assert (ours[1] is None) == (gate is None)
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=CLOSE[dtype], atol=4 * CLOSE[dtype])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_and_independence(on_kernels, p):
    mask = ops.dropout_mask((2, 20_000), p, SEED, device=DEVICE, dtype=torch.float64)
    dropped = (mask == 0).double()
    assert dropped.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 40_000) ** 0.5)
    assert mask.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    seen = torch.cat((dropped, dropped.roll(1, 1)))
    assert (torch.corrcoef(seen) - torch.eye(4, device=DEVICE)).abs().max() < 5 / 20_000**0.5


def test_the_seed_brings_the_mask_back(on_kernels):
    first, again, other = (ops.head_mask(30, 2, 3, 0.3, seed, device=DEVICE) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gradients_of_the_op_see_the_mask_of_its_values(on_kernels):
    """With another mask in the backward pass, numerical gradients would differ."""
    generator = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()

    def op(y, u, u0, gate, B, B0):
        return ops.heads(y, u, u0, gate, B, B0, num_heads=3, rank=2, dropout=(0.4, 11))

    inputs = make(3, 4), make(2, 3), make(2, 3), make(3, 3), make(4, 6), make(4, 2).detach()
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize(("method", "words"), [("rlora", {"head_dropout": 0.3}), ("multilora", {"lora_dropout": 0.3})])
def test_a_layer_on_kernels_is_the_loop(on_kernels, method, words):
    """One path makes the mask inside the kernel, the other as a tensor: of one seed they are the same."""
    from peft import get_peft_model

    from multiflora.context import reference_loop
    from multiflora.methods import build_config

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5)).double().to(DEVICE)
    model = get_peft_model(base, build_config(method, {"r": 2, "target_modules": ["0"], **words})).double().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter)
    x = torch.randn(9, 7, dtype=torch.float64, device=DEVICE)

    def run():
        torch.manual_seed(5)
        y = model(x)
        return y, *torch.autograd.grad(y.square().sum(), trained)

    with reference_loop(model):
        expected = run()
    for mine, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_chosen_for_cuda_tensors_where_asked_for(monkeypatch):
    monkeypatch.delenv("MULTIFLORA_TRITON", raising=False)
    assert not triton_kernels.serve("cuda")
    monkeypatch.setenv("MULTIFLORA_TRITON", "1")
    assert triton_kernels.serve("cuda")
    assert not triton_kernels.serve("cpu")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels are for Linux")
def test_compiles_for_gpus(tmp_path):
    """What the interpreter lets pass (types, shapes) the compiler may refuse; it needs no GPU to do so."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "90"]
