"""One layer and its competitors: one frozen weight, as many trainable parameters, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from multiflora.bench.floor import products, run_products
from multiflora.bench.memory import kept_bytes, peak_bytes
from multiflora.bench.profile import profile
from multiflora.bench.published import PublishedLoop
from multiflora.bench.results import LayerCase, MemoryCase
from multiflora.bench.shapes import Shape
from multiflora.bench.timing import Phases, interleave, samples, stopwatch
from multiflora.methods.rlora import RLoraConfig

__all__ = [
    "COMPETITORS",
    "adapted",
    "competitor",
    "matched_rank",
    "measure_heads",
    "measure_layer",
    "measure_memory",
    "run_layer",
]

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
        settings: dict[str, Any] = {"r": rank, "num_heads": heads, "lora_alpha": _ALPHA, "head_dropout": dropout}
        return adapted(base, RLoraConfig(**settings, target_modules=["0"]))
    if name == "peft":
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
    runs = _runs(layers, x, grad)
    work = products(tokens, shape.d_in, shape.d_out, heads, rank)
    timed = interleave(
        {**runs, "products": run_products(work, dtype, device)}, rounds, after_round=after_round, warmup=2
    )
    return LayerCase(
        **_case(shape, tokens, dtype, dropout, heads, rank),
        seconds=samples(timed),
        kept_bytes=_kept(layers, x),
        peak_bytes={name: peak_bytes(run, device) for name, run in runs.items()},
        flops=work.flops(),
        bytes=work.bytes(x.element_size()),
        profile={name: profile(runs[name], device) for name in ("frozen", "packed") if name in runs},
    )


def measure_memory(
    shape: Shape,
    *,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    dropout: float,
    device: torch.device,
    heads: int = 5,
    rank: int = 8,
    names: tuple[str, ...] = COMPETITORS[:4],
) -> MemoryCase:
    """Measure what each competitor keeps for its backward pass, at two numbers of tokens."""
    kept = []
    for number in tokens:
        base, x, _ = _layer(shape, number, dtype, device)
        layers = {name: competitor(name, base, heads=heads, rank=rank, dropout=dropout) for name in names}
        kept.append(_kept(layers, x))
    few, many = kept
    return MemoryCase(
        **shape._asdict(),
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        dropout=dropout,
        heads=heads,
        rank=rank,
        kept_bytes={name: (few[name], many[name]) for name in names},
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
    """Time R-LoRA with more and more heads of one total rank H r, and the loop with the fewest and the most."""
    base, x, grad = _layer(shape, tokens, dtype, device)
    layers = {"frozen": cast(nn.Module, base)}
    for kind, some in (("packed", counts), ("loop", (counts[0], counts[-1]))):
        layers |= {
            f"{kind} {heads}": competitor(kind, base, heads=heads, rank=total_rank // heads, dropout=dropout)
            for heads in some
        }
    runs = _runs(layers, x, grad)
    return LayerCase(
        **_case(shape, tokens, dtype, dropout, counts[-1], total_rank // counts[-1]),
        seconds=samples(interleave(runs, rounds, after_round=after_round, warmup=2)),
    )


def _runs(layers: dict[str, nn.Module], x: Tensor, grad: Tensor) -> dict[str, Callable[[], Phases]]:
    return {name: run_layer(layer, x, grad, autocast=_autocast(name, x.dtype)) for name, layer in layers.items()}


def _autocast(name: str, dtype: torch.dtype) -> bool:
    """Ours casts its small weights by itself; the others compute in x's type only under autocast."""
    return dtype != torch.float32 and name.split()[0] not in ("frozen", "packed")


def _kept(layers: dict[str, nn.Module], x: Tensor) -> dict[str, int]:
    """What each competitor keeps for its backward pass beyond x and all weights."""
    there = [x, *(tensor for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers()))]
    kept = {}
    for name, layer in layers.items():
        with torch.autocast(x.device.type, x.dtype) if _autocast(name, x.dtype) else nullcontext():
            kept[name] = kept_bytes(lambda layer=layer: layer(x), there)  # type: ignore[misc]
    return kept


def _case(shape: Shape, tokens: int, dtype: torch.dtype, dropout: float, heads: int, rank: int) -> dict[str, Any]:
    """What a result says of its case."""
    return {
        **shape._asdict(),
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "heads": heads,
        "rank": rank,
        "peft_rank": matched_rank(shape.d_in, shape.d_out, heads, rank),
    }


def _layer(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    """The frozen layer, its input and the gradient of its output."""
    torch.manual_seed(0)
    base = nn.Linear(shape.d_in, shape.d_out, bias=False, dtype=dtype, device=device).requires_grad_(False)
    x = torch.randn(tokens, shape.d_in, dtype=dtype, device=device, requires_grad=True)
    return base, x, torch.randn(tokens, shape.d_out, dtype=dtype, device=device)
