"""What an adapted layer of any kind asks in a forward pass: tasks, dropout, losses; and the sum, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from multiflora import ops
from multiflora.errors import AdapterError
from multiflora.forward_pass import Tokens
from multiflora.methods.base import Loss, LossInputs, Parts
from multiflora.methods.layer_weights import Plan
from multiflora.methods.merging import MergingLayer
from multiflora.methods.middle import ONE_LAYER, Made
from multiflora.task_ids import missing

__all__ = ["BranchLayer", "Looped"]


class Looped(NamedTuple):
    """What the sum gave, and what it made on the way; tokens last, but for y."""

    y: Tensor
    stems: Tensor
    gate: Tensor | None
    logits: Tensor | None


class BranchLayer(MergingLayer):
    """A frozen layer with branches, whatever it adapts: one linear layer, or a matrix of each of several experts."""

    def _base_alone(self) -> bool:
        """Whether the base layer's output is all: adapters are switched off, or in its weight already."""
        if not (self._disable_adapters or self.merged_adapters):
            return False
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        for name, merged in self._merged.items():
            self._check_merged_task(name, merged.task)
        return True

    def _check_names(self, adapter_names: Sequence[str], rows: int) -> None:
        """Refuse a batch that cannot have an adapter for each row."""
        if len(adapter_names) != rows:
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {rows} respectively."
            )
        if self.merged:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _loops(self) -> bool:
        """Whether to compute head by head: asked for, or inside a transform that only knows torch's own operations."""
        return self.routing.loop or (not torch.compiler.is_compiling() and _is_transformed())

    def _looped(self, x: Tensor, y: Tensor, adapter_name: str, parts: Parts, tasks: Tensor | None) -> Looped:
        """The sum for x, (T, d_in), added to y, (T, d_out), head by head.

        Args:
            x: What the layer reads.
            y: What it gives without branches.
            adapter_name: Whose branches.
            parts: Their tensors, of one layer or one expert.
            tasks: Of each token, (T,), where they are needed.
        """
        plan = self.plan(adapter_name)
        config, method, scale = plan.config, plan.method, self.scaling[adapter_name]
        p, seed = self._dropout("lora_dropout", adapter_name)
        dropped = x * ops.dropout_mask(tuple(x.shape), p, seed, device=x.device, dtype=x.dtype) if p > 0 else x
        router = self._router(adapter_name, parts)
        u = (F.linear(dropped, parts["A"].to(x.dtype)) * scale).t()
        made = Made(u, None if router is None else router.to(x.dtype) @ x.t(), tasks, scale)
        v, logits = method.inner(config, parts, made, ONE_LAYER)
        gate = self._head_weights(plan, adapter_name, parts, logits, tasks, len(x))
        y = ops.loop(
            y,
            dropped,
            parts["A"],
            None if gate is None else gate.t(),
            method.gate.fold(config, parts, parts["B"]),
            None,
            None,
            hidden=None if method.middle is None else v.t() / scale,
            scale=scale,
            num_heads=plan.heads,
            rank=plan.rank,
            dropout=self._dropout("head_dropout", adapter_name),
        )
        frozen = method.frozen_term(config, parts)
        if frozen is not None:
            y = y - (F.linear(F.linear(x, frozen[0].to(x.dtype)), frozen[1].to(x.dtype)) * scale).to(y.dtype)
        return Looped(y, u, gate, logits)

    def _router(self, adapter_name: str, parts: Parts) -> Tensor | None:
        """The router whose logits are made here; None where there is none, or another layer of the block has it."""
        return None if adapter_name in self.holders else parts.get("router")

    def _head_weights(
        self, plan: Plan, adapter_name: str, parts: Parts, logits: Tensor | None, tasks: Tensor | None, tokens: int
    ) -> Tensor | None:
        """Weight of each head for each token, (H, T): made here, or by the first layer of the block for all of it."""
        config, gate = plan.config, plan.method.gate
        if not plan.of_block:
            return gate.weights(config, parts, logits, tasks)
        block = plan.method.group(config, self.name)
        if adapter_name not in self.holders:
            made = gate.weights(config, parts, logits, tasks)
            assert made is not None
            self.routing.leave(adapter_name, block, made)
            return made
        left, first = self.routing.left(adapter_name, block), self.holders[adapter_name].name
        if left is None or left.shape[1] != tokens:
            seen = "has not been called before it" if left is None else f"has seen {left.shape[1]} tokens"
            raise AdapterError(
                f"{self.name} takes the gate that {first}, the first layer of its block, has made, and {first} {seen}; "
                f"expected the same {tokens} tokens in the same pass. Set router_per='layer', or leave one of the two "
                "out of target_modules."
            )
        return left.to(next(iter(parts.values())).device)

    def _dropout(self, kind: str, adapter_name: str) -> ops.Dropout:
        """A mask's probability and a fresh seed; none outside training, nor where somebody switched the module off."""
        modules: Any = self._modules
        module: Any = modules[kind]._modules.get(adapter_name)
        if module is None or not module.training:
            return 0.0, 0
        p = getattr(module, "p", 0.0)
        return (p, ops.draw_seed()) if p > 0 else (0.0, 0)

    def _loss(self, adapter_name: str, plan: Plan) -> Loss | None:
        """What the method adds to the loss, where the config has it on now and the adapter is being trained."""
        loss = plan.method.loss
        if loss is None or not self.training or not loss.on(plan.config):
            return None
        return loss if any(part.requires_grad for part in self.parts(adapter_name).values()) else None

    def _asks(self, plan: Plan, loss: Loss | None) -> bool:
        """Whether anybody wants to know of the tokens."""
        return plan.needs_task or loss is not None or self.routing.recorder is not None

    def _tasks(self, plan: Plan, tokens: Tokens, x: Tensor, rows: Sequence[int] | None) -> Tensor | None:
        """The task of each token, (T,); None where it is neither known nor needed."""
        if not plan.needs_task and self.routing.recorder is None:
            return None
        tasks = tokens.tasks(plan.config, x.device, rows)
        if tasks is None and plan.needs_task:
            raise missing(plan.config)
        return tasks

    def _value(
        self,
        loss: Loss | None,
        plan: Plan,
        stems: Tensor,
        gate: Tensor | None,
        logits: Tensor | None,
        tokens: Tokens | None,
        parts: Parts,
    ) -> Tensor | None:
        """What the layer adds to the loss, or None."""
        if loss is None or tokens is None:
            return None
        return loss.value(plan.config, LossInputs(stems, gate, logits, tokens, parts))

    def _record(self, gate: Tensor | None, tasks: Tensor | None, tokens: Tokens | None) -> None:
        recorder = self.routing.recorder
        if gate is not None and tokens is not None and recorder is not None:
            with self.routing.reporting(tokens):
                recorder(self.name, gate.detach().t(), tasks)


def _is_transformed() -> bool:
    """Inside torch.func, forward-mode differentiation or torch.jit.trace: to these the packed op is opaque."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
