r"""LoRA-GA: LoRA that starts along the full gradient (Wang et al. 2024, arXiv 2407.05000, algorithm 1).

With :math:`G = \partial L / \partial W = U S V^\top` of a layer, summed over a few batches at the base model,

.. math::
    A^0 = c\, V_{1..r}^\top, \quad B^0 = c\, U_{r+1..2r}, \quad c = \frac{d_{out}^{1/4}}{\sqrt\gamma}, \qquad
    y = W x + s\, B A x - s\, B^0 A^0 x

so the first step of gradient descent changes W along the 2r largest directions of G (theorem 3.1). The paper writes
:math:`W - s B^0 A^0` into the weight; here the same term is a frozen offset saved with the adapter, so the base stays
as it is and the adapter loads on the pristine base.

Both factors are scaled by c, as in the authors' code. peft's option of the same name scales only B, by the singular
values: another method.

`multiflora train` takes the gradient by itself. In a training loop of your own, ``trainer.add_callback`` what
`multiflora.training_callbacks` returns, or call `multiflora.start_from_gradients`; without either the adapter starts
and trains as LoRA does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from multiflora.methods.base import Method
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import Gate
from multiflora.methods.hydralora import start
from multiflora.methods.method_card import MethodCard

CARD = MethodCard(
    name="loraga",
    title="LoRA-GA",
    line="LoRA that starts along the gradient of the whole weight.",
    paper="arXiv 2407.05000",
    settings=("gamma", "gradient_batches"),
    merges="exactly",
    config="LoraGaConfig",
)


@dataclass
class LoraGaConfig(AdapterConfig):
    """LoRA-GA (arXiv 2407.05000): LoRA that starts along the gradient of the whole weight.

    Example:
        >>> LoraGaConfig(r=8, target_modules="all-linear").gamma
        16.0
    """

    method_name: ClassVar[str] = "loraga"

    gamma: float = field(default=16.0, metadata={"help": "Divides the square of the start; larger is smaller."})
    gradient_batches: int = field(default=8, metadata={"help": "Batches that the gradient is taken over."})

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "init_weights", (True, False)),
        ]


def gradient_start(gradient: Tensor, r: int, gamma: float) -> tuple[Tensor, Tensor]:
    """A⁰, (r, d_in), and B⁰, (d_out, r), from a gradient G, (d_out, d_in) with both at least 2r.

    The decomposition is the randomised one of the authors' code, of rank 4r after four rounds of iteration; it is
    exact where no side is longer than 4r. It draws from a generator of its own: every process gets the same.
    """
    devices = [gradient.device] if gradient.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        U, _, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    c = gradient.shape[0] ** 0.25 / gamma**0.5
    return c * V[:, :r].t(), c * U[:, r : 2 * r]


def has_offset(config: Any) -> bool:
    """Always, but for tests that want everything random."""
    return config.init_weights is not False


METHOD = Method(
    name="loraga",
    config=LoraGaConfig,
    heads=lambda config: 1,
    gate=Gate(),
    start=start,
    offset=has_offset,
    gradient_start=lambda config, gradient, r: gradient_start(gradient, r, config.gamma),
)
