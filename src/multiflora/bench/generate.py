"""Generation: the prefill of a prompt and the tokens after it, of SmolLM2-135M with each method's adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from multiflora import ops
from multiflora.bench.profile import profile
from multiflora.bench.published import PublishedLoop
from multiflora.bench.results import GenerateCase
from multiflora.bench.steps import adapt, linear_shapes, matched_rank, smollm2
from multiflora.bench.timing import Phases, interleave, samples, stopwatch
from multiflora.context import task
from multiflora.methods import build_config

__all__ = ["METHODS", "measure_generate"]

RANK, HEADS, TASKS = 8, 3, 4

METHODS: dict[str, dict[str, Any]] = {
    "multilora": {"r": 5, "num_modules": HEADS},
    "mlora": {"r": RANK, "num_heads": HEADS},
    "rlora": {"r": RANK, "num_heads": HEADS},
    "hydralora": {"r": RANK, "num_heads": HEADS},
    "rlora-2": {"r": RANK, "num_heads": 2},
    "rlora-16": {"r": 1, "num_heads": 16},
    "mtllora": {"r": RANK, "num_heads": HEADS, "num_tasks": TASKS},
    "moelora": {"r": 2 * RANK, "num_experts": 4, "num_tasks": TASKS},
}
"""Competitor -> its settings. What stands before a dash is the method; rlora-2 and rlora-16 have one total rank."""


def measure_generate(
    *,
    batch: int,
    prompt: int,
    tokens: int,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    after_round: Callable[[], None] | None = None,
) -> GenerateCase:
    """Time prefill and decoding of all competitors side by side, greedily and with a cache.

    The competitors are the model alone ("base"), each of :data:`METHODS`, peft's LoRA as large as R-LoRA, the same
    merged, and the published loop. "products" is the practical floor: R-LoRA's two products in all layers, on
    ready matrices.

    Args:
        batch: Rows.
        prompt: Tokens of each row's prompt.
        tokens: Tokens that are generated.
        dtype: Of the model's weights; adapters have float32 masters.
        rounds: Rounds that count.
        device: Where.
        after_round: Called after every round.
    """
    from peft import LoraConfig

    base: Any = smollm2(dtype, device).eval()
    models: dict[str, nn.Module] = {"base": base}
    for name, settings in METHODS.items():
        config = build_config(name.partition("-")[0], {**settings, "target_modules": "all-linear"})
        models[name] = adapt(base, config).eval()
    rank = matched_rank(base, _trained(models["rlora"]))
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    models["peft"] = adapt(base, lora).eval()
    merged: Any = adapt(smollm2(dtype, device), lora)
    models["peft merged"] = merged.merge_and_unload().eval()
    models["loop"] = _with_loops(dtype, device)
    ids = torch.randint(0, int(base.config.vocab_size), (batch, prompt), device=device)
    runs = {name: _run(model, ids, tokens) for name, model in models.items()}
    runs["products"] = _products(base, batch, prompt, tokens, dtype, device)
    return GenerateCase(
        model="SmolLM2-135M",
        batch=batch,
        prompt=prompt,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        parameters={name: _trained(model) for name, model in models.items() if name not in ("base", "peft merged")},
        seconds=samples(interleave(runs, rounds, after_round=after_round)),
        profile={name: profile(runs[name], device) for name in ("base", "rlora")},
    )


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _with_loops(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with every linear layer but the head in the published loop, weights in the layer's own type."""
    model: Any = smollm2(dtype, device)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                loop = PublishedLoop(child, HEADS, RANK, 1.0, 0.0)
                setattr(parent, name, loop.to(dtype))
    out: nn.Module = model.eval()
    return out


def _run(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], Phases]:
    def run() -> Phases:
        with torch.inference_mode(), task(model, 0):
            lap = stopwatch(ids.device)
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            latest = out.logits[:, -1:].argmax(-1)
            phases = {"prefill": lap()}
            for _ in range(tokens):
                out = model(input_ids=latest, past_key_values=out.past_key_values, use_cache=True)
                latest = out.logits[:, -1:].argmax(-1)
            return {**phases, "decode": lap()}

    return run


def _products(
    model: nn.Module, batch: int, prompt: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Phases]:
    """R-LoRA's branches of every layer alone."""
    work = []
    for (d_in, d_out), count in linear_shapes(model).items():
        rows = torch.randn(2 * RANK + HEADS, d_in, dtype=dtype, device=device)
        columns = torch.randn((HEADS + 1) * RANK, d_out, dtype=dtype, device=device)
        prepared = ops.Prepared(rows, columns, HEADS, RANK, routed=True, top_k=0)
        sizes = [(batch, prompt), (batch, 1)]
        work.append((count, prepared, [torch.randn(*size, d_in, dtype=dtype, device=device) for size in sizes], d_out))
    places = [[x.new_zeros(*x.shape[:-1], d_out) for x in inputs] for _, _, inputs, d_out in work]

    def once(which: int) -> None:
        for (count, prepared, inputs, _), ready in zip(work, places, strict=True):
            for _ in range(count):
                ops.infer(inputs[which], prepared, y=ready[which])

    def run() -> Phases:
        with torch.inference_mode():
            lap = stopwatch(device)
            once(0)
            phases = {"prefill": lap()}
            for _ in range(tokens):
                once(1)
            return {**phases, "decode": lap()}

    return run
