"""A mixture's fused experts and their competitors: one frozen layer, as many trainable parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from multiflora.bench.profile import profile
from multiflora.bench.results import ExpertsCase, ExpertsWork
from multiflora.bench.shapes import Mixture
from multiflora.bench.steps import adapt
from multiflora.bench.timing import Phases, interleave, samples, stopwatch
from multiflora.context import find

__all__ = ["EXPERTS_COMPETITORS", "matched_rank", "measure_experts"]

EXPERTS_COMPETITORS = ("frozen", "packed", "peft")
"""The frozen experts as transformers computes them; R-LoRA; peft's LoRA with as many parameters."""

_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
_TOGETHER = 4
"""Calls that are timed together in decoding: one token takes little longer than a clock needs to be sure."""


class _Layer(nn.Module):
    """Experts and no router: who serves which token is given."""

    def __init__(self, mixture: Mixture) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        config = MixtralConfig(
            hidden_size=mixture.d_model,
            intermediate_size=mixture.d_expert,
            num_local_experts=mixture.experts,
            num_experts_per_tok=mixture.top_k,
        )
        config._experts_implementation = "grouped_mm"  # what transformers takes where it is not told otherwise
        self.experts = MixtralExperts(config)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.03, 0.03)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.experts(x, chosen, weights)
        return out


def matched_rank(mixture: Mixture, heads: int, rank: int) -> int:
    """The rank at which peft's LoRA of both parameters comes nearest to the parameters of R-LoRA.

    Example:
        >>> matched_rank(Mixture("m", 1024, 512, experts=32, top_k=8), heads=5, rank=8)
        28
    """
    shapes = mixture.shapes()
    ours = sum(rank * d_in + heads * rank * d_out + heads * d_in for d_in, d_out in shapes)
    return max(1, round(ours / sum(d_in + d_out for d_in, d_out in shapes)))


def measure_experts(
    mixture: Mixture,
    *,
    work: ExpertsWork,
    tokens: int,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    heads: int = 5,
    rank: int = 8,
    after_round: Callable[[], None] | None = None,
) -> ExpertsCase:
    """Time all competitors on the experts of one layer, side by side. There is no dropout: peft's has none here.

    Args:
        mixture: The layer.
        work: A training step; a forward pass without gradients that starts anew; or one that goes on with a cache.
        tokens: T; each is served by ``mixture.top_k`` experts.
        dtype: Of x and the frozen weights; adapters have float32 weights.
        rounds: Rounds that count.
        device: Where.
        heads: H of R-LoRA.
        rank: r of each head.
        after_round: Called after every round.
    """
    from peft import LoraConfig

    from multiflora import RLoraConfig

    torch.manual_seed(0)
    with torch.device(device):
        layer = _Layer(mixture).to(dtype).requires_grad_(False)
        x = torch.randn(tokens, mixture.d_model, dtype=dtype, requires_grad=work == "step")
        best, chosen = torch.randn(tokens, mixture.experts).topk(mixture.top_k)
        inputs = (x, chosen, torch.softmax(best, -1).to(dtype))
    r = matched_rank(mixture, heads, rank)
    where: dict[str, Any] = {"target_modules": [], "target_parameters": _PARAMETERS}
    models = {
        "frozen": layer,
        "packed": adapt(layer, RLoraConfig(r=rank, num_heads=heads, **where)),
        "peft": adapt(layer, LoraConfig(r=r, lora_alpha=r, **where)),
    }
    runs = {name: _run(name, models[name], inputs, work) for name in EXPERTS_COMPETITORS}
    timed = interleave(runs, rounds, after_round=after_round)
    return ExpertsCase(
        **mixture._asdict(),
        work=work,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        heads=heads,
        rank=rank,
        peft_rank=r,
        parameters={name: _trained(model) for name, model in models.items()},
        seconds=samples(timed),
        profile={name: profile(runs[name], device) for name in ("frozen", "packed")},
    )


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _run(name: str, model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], work: ExpertsWork) -> Callable[[], Phases]:
    x = inputs[0]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # ours casts its small weights by itself; peft's takes all experts along in each call, so one is long enough
    casts = x.dtype != torch.float32 and name == "peft"
    calls = _TOGETHER if work == "decode" and name != "peft" else 1
    grad = torch.randn_like(x)
    model.train(work == "step")
    if work == "decode" and (routing := find(model)) is not None:
        routing.begin(model, inputs, {})  # and it is never over: each call goes on with the answer

    def run() -> Phases:
        for tensor in (x, *trained):
            tensor.grad = None
        context = torch.autocast(x.device.type, x.dtype) if casts else nullcontext()
        lap = stopwatch(x.device)
        with context, torch.set_grad_enabled(work == "step"):
            for _ in range(calls):
                y = model(*inputs)
        phases: Phases = {"forward": {clock: seconds / calls for clock, seconds in lap().items()}}
        if work == "step":
            y.backward(grad)
            phases["backward"] = lap()
        return phases

    return run
