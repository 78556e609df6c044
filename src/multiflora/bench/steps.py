"""A whole training step of SmolLM2-135M: forward, loss on the last positions of each row, backward, AdamW."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiflora.bench.floor import Products, modules_products, products, run_products
from multiflora.bench.memory import peak_bytes
from multiflora.bench.profile import profile
from multiflora.bench.results import StepCase
from multiflora.bench.shapes import SMOLLM2
from multiflora.bench.timing import Phases, interleave, samples, stopwatch

__all__ = ["STEP_COMPETITORS", "adapt", "linear_shapes", "matched_rank", "measure_step", "smollm2", "step"]

HEADS, RANK = 5, 8
"""Of R-LoRA; MultiLoRA has three modules of the same rank."""
MODULES = 3

STEP_COMPETITORS = ("frozen", "packed", "peft", "multilora", "peft 3r", "products", "multilora products")
"""Forward and input-gradient backward of the frozen model; R-LoRA; peft's LoRA with as many parameters; MultiLoRA with
three modules; peft's LoRA of three times the rank; R-LoRA's products alone; MultiLoRA's. Adapters are on all linear
layers."""


def smollm2(dtype: torch.dtype, device: torch.device, **changes: Any) -> nn.Module:
    """SmolLM2-135M with random weights, which cost what the real ones cost; ``changes`` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, **changes}))
    frozen: nn.Module = model.to(dtype).requires_grad_(False)
    return frozen


def _configs(dropout: float, peft_rank: int) -> dict[str, Any]:
    from peft import LoraConfig

    from multiflora import MultiLoraConfig, RLoraConfig

    shared: dict[str, Any] = {"target_modules": "all-linear"}
    return {
        "packed": RLoraConfig(r=RANK, num_heads=HEADS, head_dropout=dropout, **shared),
        "peft": LoraConfig(r=peft_rank, lora_alpha=peft_rank, lora_dropout=dropout, **shared),
        "multilora": MultiLoraConfig(r=RANK, num_modules=MODULES, lora_dropout=dropout, **shared),
        "peft 3r": LoraConfig(r=MODULES * RANK, lora_alpha=RANK, lora_dropout=dropout, **shared),
    }


def adapt(model: nn.Module, config: Any) -> nn.Module:
    """The model with an adapter of random weights, in training mode; its frozen weights are those of ``model``."""
    from peft import get_peft_model

    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model, shared), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02)
    training: nn.Module = adapted.train()
    return training


def matched_rank(model: nn.Module, parameters: int) -> int:
    """The rank at which a plain LoRA on all linear layers but the head has about so many parameters."""
    widths = sum((d_in + d_out) * count for (d_in, d_out), count in linear_shapes(model).items())
    return max(1, round(parameters / widths))


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """How many linear layers of each shape (d_in, d_out) a model has, its head left out."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return Counter((layer.in_features, layer.out_features) for layer in layers)


def work_alone(model: nn.Module, tokens: int) -> dict[str, dict[Products, int]]:
    """What R-LoRA's and MultiLoRA's branches on all linear layers have to compute, and how often each."""
    shapes = linear_shapes(model).items()
    return {
        "products": {products(tokens, *shape, HEADS, RANK): count for shape, count in shapes},
        "multilora products": {modules_products(tokens, *shape, MODULES, RANK): count for shape, count in shapes},
    }


def all_products(work: Mapping[Products, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Phases]:
    """The products of every layer of a model alone, layers of one shape on the same buffers."""
    runs = {run_products(item, dtype, device): count for item, count in work.items()}

    def run() -> Phases:
        total: Phases = {}
        for one, count in runs.items():
            for _ in range(count):
                for phase, clocks in one().items():
                    spent = total.setdefault(phase, dict.fromkeys(clocks, 0.0))
                    for clock, seconds in clocks.items():
                        spent[clock] += seconds
        return total

    return run


def step(model: nn.Module, ids: Tensor, labels: int, *, autocast: bool) -> Callable[[], Phases]:
    """One training step.

    Args:
        model: A causal model. One without trainable parameters is asked for the gradient of its embedded input.
        ids: (rows, length).
        labels: The last so many positions of each row are predicted.
        autocast: Compute in the frozen weights' type with float32 adapter weights.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
    embedded = None if trained else base.get_input_embeddings()(ids).requires_grad_()
    targets = ids[:, -labels:].reshape(-1)

    def run() -> Phases:
        if embedded is not None:
            embedded.grad = None
        lap = stopwatch(ids.device)
        with torch.autocast(ids.device.type, dtype) if autocast else nullcontext():
            inputs = {"input_ids": ids} if embedded is None else {"inputs_embeds": embedded}
            hidden = base.model(**inputs, use_cache=False).last_hidden_state
            # gathered into one matrix first: a frozen head on a 3-D slice copies its weight for every row
            chosen = hidden[:, -labels - 1 : -1].reshape(-1, hidden.shape[-1])
            logits = base.lm_head(chosen)
        loss = F.cross_entropy(logits.float(), targets)
        phases = {"forward": lap()}
        torch.autograd.backward(loss)
        phases["backward"] = lap()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        phases["update"] = lap()
        return phases

    return run


def measure_step(
    *,
    rows: int,
    length: int,
    labels: int,
    dtype: torch.dtype,
    dropout: float,
    rounds: int,
    device: torch.device,
    names: tuple[str, ...] = STEP_COMPETITORS,
    memory: bool = True,
    after_round: Callable[[], None] | None = None,
) -> StepCase:
    """Time whole steps of all competitors side by side.

    Args:
        rows: Of a batch.
        length: Tokens in a row.
        labels: Positions with loss in a row.
        dtype: Of the frozen weights.
        dropout: On every head's input for R-LoRA, on x for the others.
        rounds: Rounds that count.
        device: Where.
        names: Which competitors.
        memory: Also measure peak memory, by one more step each.
        after_round: Called after every round.
    """
    model = smollm2(dtype, device)
    ours = _configs(dropout, 1)["packed"]
    packed = adapt(model, ours)
    size = sum(parameter.numel() for parameter in packed.parameters() if parameter.requires_grad)
    configs = _configs(dropout, matched_rank(model, size))
    models = {"frozen": model, "packed": packed}
    models |= {name: adapt(model, configs[name]) for name in names if name in configs and name not in models}
    alone = work_alone(model, rows * length)
    ids = torch.randint(0, int(SMOLLM2["vocab_size"]), (rows, length), device=device)
    half = dtype != torch.float32
    steps = {
        name: step(models[name], ids, labels, autocast=half and name.startswith("peft"))
        for name in names
        if name in models
    }
    floor = {name: all_products(alone[name], dtype, device) for name in names if name in alone}
    timed = interleave({**steps, **floor}, rounds, after_round=after_round)
    return StepCase(
        model="SmolLM2-135M",
        rows=rows,
        length=length,
        labels=labels,
        dtype=str(dtype).removeprefix("torch."),
        dropout=dropout,
        parameters={
            name: sum(parameter.numel() for parameter in models[name].parameters() if parameter.requires_grad)
            for name in steps
        },
        seconds=samples(timed),
        peak_bytes={name: peak_bytes(run, device) for name, run in steps.items()} if memory else {},
        flops=sum(item.flops() * count for item, count in alone["products"].items()),
        bytes=sum(item.bytes(dtype.itemsize) * count for item, count in alone["products"].items()),
        profile={name: profile(steps[name], device) for name in ("frozen", "packed", "multilora") if name in steps},
    )
