"""One layer and its competitors: one frozen weight, as many trainable parameters, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from multiflora.bench.floor import products, run_products
from multiflora.bench.memory import kept_bytes, peak_bytes
from multiflora.bench.published import PublishedLoop
from multiflora.bench.results import LayerCase
from multiflora.bench.shapes import Shape
from multiflora.bench.timing import Phases, interleave, samples, stopwatch

__all__ = ["COMPETITORS", "adapted", "competitor", "matched_rank", "measure_heads", "measure_layer", "run_layer"]

COMPETITORS = ("frozen", "packed", "peft", "loop", "compiled loop")
"""The frozen layer alone; ours; peft's LoRA with as many parameters; the published loop; torch.compile of that loop."""

_ALPHA = 16


def matched_rank(d_in: int, d_out: int, heads: int, rank: int) -> int:
    """The rank at which a plain LoRA comes nearest to the parameters of R-LoRA.

    Example:
        >>> matched_rank(4096, 11008, heads=5, rank=8)
        33
    """
    return max(1, round((rank * d_in + heads * rank * d_out + heads * d_in) / (d_in + d_out)))


def adapted(base: nn.Linear, config: Any) -> nn.Module:
    """The layer peft makes of ``base`` with a config, in training mode, its weights random (not zero) throughout."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(cast(Any, nn.Sequential(base)), config)
    layer = cast(nn.Module, cast(Any, model).base_model.model[0])
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02)
    return layer.train()


def competitor(
    name: str, base: nn.Linear, *, heads: int, rank: int, dropout: float, like: nn.Module | None = None
) -> nn.Module:
    """Build one of :data:`COMPETITORS` around ``base`` (which is frozen and shared).

    Args:
        name: Which.
        base: The frozen layer.
        heads: Heads of R-LoRA and of the loop.
        rank: Their rank.
        dropout: On every head's input for R-LoRA and the loop, on x for peft's LoRA.
        like: A packed layer whose weights the loop takes, or None.
    """
    if name == "frozen":
        return base
    if name == "packed":
        from multiflora import RLoraConfig

        settings: dict[str, Any] = {"r": rank, "num_heads": heads, "lora_alpha": _ALPHA, "head_dropout": dropout}
        return adapted(base, RLoraConfig(**settings, target_modules=["0"]))
    if name == "peft":
        from peft import LoraConfig

        r = matched_rank(base.in_features, base.out_features, heads, rank)
        return adapted(base, LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, target_modules=["0"]))
    loop = PublishedLoop(base, heads, rank, _ALPHA / rank, dropout)
    if like is not None:
        parts = cast(Any, like).parts("default")
        loop.load_packed(parts["A"], parts["B"], parts["router"])
    return loop if name == "loop" else cast(nn.Module, torch.compile(loop, dynamic=False))


def run_layer(layer: nn.Module, x: Tensor, grad: Tensor, *, autocast: bool) -> Callable[[], Phases]:
    """One forward and one backward pass of a layer in the middle of a network: x needs its gradient, too.

    Args:
        layer: Any competitor.
        x: (T, d_in), a leaf that requires gradient.
        grad: The gradient of the layer's output.
        autocast: Compute in x's dtype with float32 adapter weights, as ``Trainer(bf16=True)`` does.
    """
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run() -> Phases:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        context = torch.autocast(x.device.type, x.dtype) if autocast else nullcontext()
        lap = stopwatch(x.device)
        with context:
            y = layer(x)
        forward = lap()
        y.backward(grad)
        return {"forward": forward, "backward": lap()}

    return run


def measure_layer(
    shape: Shape,
    *,
    tokens: int,
    dtype: torch.dtype,
    dropout: float,
    rounds: int,
    device: torch.device,
    heads: int = 5,
    rank: int = 8,
    names: tuple[str, ...] = COMPETITORS[:4],
    after_round: Callable[[], None] | None = None,
) -> LayerCase:
    """Time all competitors on one layer, side by side, and measure the memory each takes.

    Args:
        shape: The layer.
        tokens: T.
        dtype: Of x and the frozen weight; adapters have float32 weights.
        dropout: See :func:`competitor`.
        rounds: Rounds that count.
        device: Where.
        heads: H.
        rank: r of each head.
        names: Which competitors.
        after_round: Called after every round.
    """
    base, x, grad = _layer(shape, tokens, dtype, device)
    layers = {name: competitor(name, base, heads=heads, rank=rank, dropout=dropout) for name in names}
    # ours casts its small weights by itself; the others compute in x's type only under autocast
    cast_by_torch = {name: dtype != torch.float32 and name not in ("frozen", "packed") for name in names}
    runs = {name: run_layer(layer, x, grad, autocast=cast_by_torch[name]) for name, layer in layers.items()}
    work = products(tokens, shape.d_in, shape.d_out, heads, rank)
    timed = interleave(
        {**runs, "products": run_products(work, dtype, device)}, rounds, after_round=after_round, warmup=2
    )
    weights = [x, *(tensor for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers()))]
    kept = {}
    for name, layer in layers.items():
        with torch.autocast(device.type, dtype) if cast_by_torch[name] else nullcontext():
            kept[name] = kept_bytes(lambda layer=layer: layer(x), weights)  # type: ignore[misc]
    return LayerCase(
        **shape._asdict(),
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        dropout=dropout,
        heads=heads,
        rank=rank,
        peft_rank=matched_rank(shape.d_in, shape.d_out, heads, rank),
        seconds=samples(timed),
        kept_bytes=kept,
        peak_bytes={name: peak_bytes(run, device) for name, run in runs.items()},
        flops=work.flops(),
        bytes=work.bytes(x.element_size()),
    )


def measure_heads(
    shape: Shape,
    *,
    tokens: int,
    dtype: torch.dtype,
    dropout: float,
    rounds: int,
    device: torch.device,
    total_rank: int = 32,
    counts: tuple[int, ...] = (2, 4, 8, 16),
    after_round: Callable[[], None] | None = None,
) -> LayerCase:
    """Time R-LoRA with more and more heads of one total rank H r; see :func:`measure_layer`."""
    base, x, grad = _layer(shape, tokens, dtype, device)
    layers = {"frozen": cast(nn.Module, base)} | {
        f"{heads} heads": competitor("packed", base, heads=heads, rank=total_rank // heads, dropout=dropout)
        for heads in counts
    }
    runs = {name: run_layer(layer, x, grad, autocast=False) for name, layer in layers.items()}
    return LayerCase(
        **shape._asdict(),
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        dropout=dropout,
        heads=counts[-1],
        rank=total_rank // counts[-1],
        peft_rank=matched_rank(shape.d_in, shape.d_out, counts[-1], total_rank // counts[-1]),
        seconds=samples(interleave(runs, rounds, after_round=after_round, warmup=2)),
    )


def _layer(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    """The frozen layer, its input and the gradient of its output."""
    torch.manual_seed(0)
    base = nn.Linear(shape.d_in, shape.d_out, bias=False, dtype=dtype, device=device).requires_grad_(False)
    x = torch.randn(tokens, shape.d_in, dtype=dtype, device=device, requires_grad=True)
    return base, x, torch.randn(tokens, shape.d_out, dtype=dtype, device=device)
