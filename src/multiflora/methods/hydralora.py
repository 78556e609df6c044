r"""HydraLoRA: one shared A, N heads B at zero, a router on the token (Tian et al. 2024, arXiv 2404.19245, eq. 2-4).

.. math:: y = W x + s \sum_{h=1}^{N} \omega_h(x)\, B_h A x, \qquad \omega(x) = \operatorname{softmax}(R x)

The router reads the layer's input before dropout and starts random: with zero heads *and* an equal router all heads
would stay copies of one another. The paper's printed R is r wide; its code routes from the d_in-wide input, as here.
The published code draws a dropout mask on x for each head and computes A x as often; here one mask serves all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Union

import torch
from torch import Tensor

from multiflora.errors import DataError
from multiflora.methods.base import Method
from multiflora.methods.block_router import block_group, shared_router
from multiflora.methods.config import AdapterConfig, one_of
from multiflora.methods.gates import TokenRouter
from multiflora.methods.initial import kaiming_uniform, random_heads, stem_and_zero_heads
from multiflora.methods.method_card import MethodCard
from multiflora.methods.router import ROUTER_LOSS, RouterConfig

CARD = MethodCard(
    name="hydralora",
    title="HydraLoRA",
    line="One shared A, heads B that start at zero, a token router.",
    paper="arXiv 2404.19245",
    settings=("num_heads", "top_k", "router_balance_loss", "router_z_loss", "router_per"),
    merges="no (token router)",
    experts="with target_parameters",
    config="HydraLoraConfig",
)


@dataclass
class HydraLoraConfig(RouterConfig):
    """HydraLoRA (arXiv 2404.19245): shared A, ``num_heads`` heads, a router on the token.

    Defaults: r, alpha and dropout of the published script, 3 heads of the paper.

    Example:
        >>> HydraLoraConfig(num_heads=4, target_modules="all-linear").lora_dropout
        0.05
    """

    method_name: ClassVar[str] = "hydralora"

    r: int = field(default=4, metadata={"help": "Rank of the shared A and of each head."})
    lora_alpha: float = field(default=32, metadata={"help": "alpha; the update is scaled by alpha/r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the stem, in [0, 1)."})
    num_heads: Union[int, list[int]] = field(  # noqa: UP007
        default=3, metadata={"help": "How many heads B (N); see suggest_num_heads."}
    )

    def problems(self) -> list[str]:
        """See the base class."""
        return [
            *super().problems(),
            *one_of(self, "init_weights", (True, False)),
        ]


def suggest_num_heads(texts: Sequence[str], *, most: int = 10, seed: int = 0) -> int:
    """How many heads a corpus asks for: k-means on TF-IDF, k at the elbow (HydraLoRA, appendix B).

    The elbow is the k whose point lies farthest below the straight line from the first to the last point of the curve
    of inertia over k. Only the number is taken; rows are not assigned to heads.

    Args:
        texts: A sample of the training texts, at least two different ones; a few thousand are plenty.
        most: The largest k tried.
        seed: Of k-means.

    Returns:
        k, from 1 to ``most``.

    Raises:
        DataError: Fewer than two different texts.

    Example:
        >>> suggest_num_heads(["add 2 and 3", "add 4 and 5", "translate cat", "translate dog"] * 5, most=4)
        2
    """
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(set(texts)) < 2:
        raise DataError(f"suggest_num_heads got {len(set(texts))} different text(s); give it a sample of at least two.")
    vectors = TfidfVectorizer().fit_transform(texts)
    tries = range(1, min(most, len(set(texts))) + 1)
    inertia = torch.tensor([KMeans(k, n_init=10, random_state=seed).fit(vectors).inertia_ for k in tries])
    line = torch.linspace(float(inertia[0]), float(inertia[-1]), len(inertia))
    return int((line - inertia).argmax()) + 1


def start(config: AdapterConfig, A: Tensor, B: Tensor, heads: int, generator: torch.Generator | None) -> None:
    """LoRA's start, or everything random for tests."""
    if config.init_weights:
        stem_and_zero_heads(config, A, B, heads, generator)
    else:
        kaiming_uniform(A, generator)
        random_heads(B, heads, generator)


METHOD = Method(
    name="hydralora",
    config=HydraLoraConfig,
    heads=lambda config: config.num_heads,
    gate=TokenRouter(),
    start=start,
    shared=shared_router,
    group=block_group,
    loss=ROUTER_LOSS,
)
