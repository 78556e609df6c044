"""The methods under contract and what the tests do to a model. A method joins by being in ``METHODS``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from multiflora.methods import METHODS, build_config, mixlora
from multiflora.methods.base import Method
from multiflora.methods.gates import TokenRouter
from multiflora.methods.layer import BranchLinear

IDS = torch.tensor([[5, 9, 11, 3, 7, 22, 8], [41, 2, 17, 30, 6, 12, 19]])
TASK_NAMES = ["verse", "prose"]
TASKS = torch.tensor([1, 0])


@dataclass(frozen=True)
class Case:
    """One method and the settings it is tested with."""

    described: Method
    words: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    """Of several cases of one method."""

    @property
    def name(self) -> str:
        """The method's name."""
        return self.described.name

    @property
    def id(self) -> str:
        """In the names of tests."""
        return "-".join(filter(None, (self.name, self.kind)))

    @property
    def method(self) -> Method:
        """The method with these settings."""
        return self.described.of(self.config())

    @property
    def merges(self) -> str:
        """ "no", "per task" or "exactly"."""
        return self.method.merges()

    def prepares(self, tasks: Tensor) -> bool:
        """Whether branches have a form for inference, for rows of these tasks."""
        gate, middle = self.method.gate, self.method.middle
        if gate.reads == "token" and type(gate) is not TokenRouter:
            return False  # a method may bring a gate of its own on the token
        mixed = self.method.needs_task() and len(set(tasks.tolist())) > 1
        # what comes between the two products has a form where it is one for all
        return middle is None or (middle.reads != "token" and not mixed)

    def config(self, **more: Any) -> Any:
        """A fresh config, on all linear layers and two named tasks."""
        named = more.get("target_modules", "up_proj")
        if self.kind == "by_block" and ("target_parameters" in more or "up_proj" not in named):
            pytest.skip("none of these layers is in a feed-forward block")
        own = {"target_modules": "all-linear", "task_names": list(TASK_NAMES), **self.words}
        return build_config(self.name, own | more)

    def adapt(self, base: nn.Module, seed: int = 1, **more: Any) -> PeftModel:
        """The base with a fresh adapter, in eval mode."""
        torch.manual_seed(seed)
        return get_peft_model(base, self.config(**more)).eval()

    def trained(self, base: nn.Module, seed: int = 1, **more: Any) -> PeftModel:
        """The same, every adapter weight moved as training would move it."""
        return stir(self.adapt(base, seed, **more), seed)


# parts that no other method has: between the two products, where little else is the same
KINDS = {
    "flylora": {"stem": "own", "gate": "largest", "num_heads": 4, "top_k": 2, "stem_init": "sparse"},
    "comol": {"gate": "sum", "num_heads": 1, "core": "full"},
    "d2mora": {"stem": "blended", "gate": "stem"},
}
CASES = [Case(import_module(card.module).METHOD) for card in METHODS.values() if card.module is not None]
CASES += [Case(import_module("multiflora.methods.parts").METHOD, words, kind) for kind, words in KINDS.items()]
CASES += [
    Case(mixlora.METHOD, {"num_experts": 4, "heads_pattern": {".*(0|q|fi).*": 3}}, "by_layer"),
    Case(mixlora.METHOD, {"router_per": "block", "num_experts": 4}, "by_block"),
]


def stir(model: nn.Module, seed: int = 1) -> Any:
    """Add noise to all trainable weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator).to(weight)
    return model


@torch.no_grad()
def logits(model: nn.Module, tasks: Tensor | None = TASKS, **more: Any) -> Tensor:
    """Of two rows, in eval mode; ``tasks=None`` for a model without adapters, or with a task set outside."""
    model.eval()
    words = {} if tasks is None else {"task_id": tasks}
    return model(input_ids=IDS, **words, **more).logits


def loss(model: nn.Module) -> Tensor:
    """Of the two rows, each token the label of the one before."""
    return model(input_ids=IDS, labels=IDS, task_id=TASKS).loss


def train(model: nn.Module, steps: int = 3, lr: float = 0.01) -> list[float]:
    """A plain loop; returns the loss before each step."""
    model.train()
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=lr)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        history.append(float(value))
    return history


def layers(model: nn.Module) -> Iterator[BranchLinear]:
    """All adapted layers."""
    return (module for module in model.modules() if isinstance(module, BranchLinear))


def gates(model: nn.Module) -> int:
    """How many gates the adapter makes: one in each layer that takes none from another."""
    return sum("default" not in layer.holders for layer in layers(model))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_fingerprint(model: nn.Module) -> str:
    """The same of the base's weights alone, whatever adapters are on it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return fingerprint(
        {
            name.replace(".base_layer", ""): value
            for name, value in base.state_dict().items()
            if not any(part.startswith("mf_") for part in name.split("."))
        }
    )


def relative(a: Tensor, b: Tensor) -> float:
    """How far a is from b, relative to b."""
    return float((a - b).norm() / b.norm())


__all__ = [
    "CASES",
    "IDS",
    "TASKS",
    "TASK_NAMES",
    "BranchLinear",
    "Case",
    "LlamaForCausalLM",
    "base_fingerprint",
    "fingerprint",
    "gates",
    "layers",
    "logits",
    "loss",
    "relative",
    "stir",
    "train",
]
