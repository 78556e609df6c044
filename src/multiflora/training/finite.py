"""Numbers gone bad: which step, and which examples, first gave a loss or a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

__all__ = ["StepNumbers", "gradients_finite"]


@dataclass
class StepNumbers:
    """What one optimiser step came to in this process; nothing here waits for the device until it is asked."""

    step: int
    """Its number, from 1."""
    losses: list[Tensor] = field(default_factory=list)
    """Nats of each labelled token, (n,), one tensor for each forward pass."""
    examples: list[Tensor] = field(default_factory=list)
    """The number of each token's example, (n,)."""
    gradients: Tensor | None = None
    """Whether all gradients are finite; None where nobody looked."""

    def add(self, losses: Tensor, examples: Tensor) -> None:
        """Note a forward pass."""
        self.losses.append(losses.detach())
        self.examples.append(examples)

    def are_finite(self) -> bool:
        """Tell whether losses and gradients are finite; waits for the device if it has not come this far."""
        sums = [losses.sum() for losses in self.losses]
        flags = [torch.stack(sums).isfinite().all()] if sums else []
        flags += [] if self.gradients is None else [self.gradients.to(flags[0].device if flags else "cpu")]
        return bool(torch.stack(flags).all()) if flags else True

    def suspects(self) -> tuple[list[int], bool]:
        """Return the examples to look at, and whether their own losses give them away.

        Without a bad loss it is the gradients that are bad, and then any example of the step may be the cause.
        """
        if not self.losses:
            return [], False
        losses, examples = torch.cat(self.losses), torch.cat(self.examples)
        bad = sorted(set(examples[~losses.isfinite()].tolist()))
        return (bad, True) if bad else (sorted(set(examples.tolist())), False)


def gradients_finite(parameters: Iterable[Tensor]) -> Tensor | None:
    """Tell whether the gradients have a finite norm, as a tensor on their device; None where there are none here.

    Args:
        parameters: The trained ones. Of a sharded one, this process's part is looked at.
    """
    mine = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    return get_total_norm([gradient for gradient in mine if gradient.numel()]).isfinite() if mine else None
