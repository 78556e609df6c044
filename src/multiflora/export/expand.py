r"""A trained LoRA as the warm start of a multi-head adapter: more heads, the same outputs.

The heads must differ, or training would keep them alike, and their sum must still be the LoRA. Each method has its way:

===========  ========================================================================================================
HydraLoRA    every head is the LoRA's B; the router, drawn at random, sums to 1 and will tell them apart
R-LoRA       head h is B + R_h with R_h random, and the frozen offset takes the mean of the R_h off again
M-LoRA       the same; without a router
MultiLoRA    the LoRA is one module with scale 1, the others start as ever, with scale 0
===========  ========================================================================================================
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multiflora import ops
from multiflora.errors import ConfigError, ExportError
from multiflora.export.plain import CONFIG, KEPT, ROOT, WEIGHTS, Pair, PlainLora, read_lora
from multiflora.export.saved import Layer, method_of, open_adapter, rank_and_alpha
from multiflora.export.stage import check_free, staged
from multiflora.files import saving, user_path
from multiflora.methods import build_config
from multiflora.methods.base import Method
from multiflora.suggest import did_you_mean
from multiflora.tensor_file import write_tensors

__all__ = ["EXPANDABLE", "expand"]

Warm = Callable[[Method, Any, dict[str, Tensor], Tensor, Tensor], None]


def expand(
    lora: str | Path, folder: str | Path, *, method: str = "hydralora", heads: int = 3, seed: int = 0, **settings: Any
) -> Path:
    """Write a multi-head adapter that computes what a plain LoRA computes, ready to be trained on.

    Load it with ``PeftModel.from_pretrained(base, folder, is_trainable=True)``. Nothing but the LoRA's files is read.

    Args:
        lora: The folder a plain LoRA was saved to.
        folder: Where the adapter goes; it must not hold anything yet.
        method: One of ``hydralora``, ``rlora``, ``mlora``, ``multilora``.
        heads: How many heads (MultiLoRA: modules).
        seed: Of what is drawn at random: heads' differences, routers.
        settings: Other settings of the method, such as ``task_names`` or ``head_dropout``.

    Returns:
        The folder.

    Raises:
        ConfigError: No such method, or a setting that is not one of its own or changes the outputs.
        ExportError: The LoRA's files are damaged, or the check of the result failed.

    Example:
        >>> expand("runs/lora", "runs/warm", method="rlora", heads=5)  # doctest: +SKIP
    """
    output = user_path(folder)
    if method not in EXPANDABLE:
        raise ConfigError(f"method is {method!r}; a LoRA cannot be expanded to it; {did_you_mean(method, EXPANDABLE)}")
    check_free(output)
    plain = read_lora(user_path(lora))
    config = build_config(method, _settings(plain, method, heads) | settings)
    # which base it was trained on is not a setting, but belongs to the adapter
    config.base_model_name_or_path, config.revision = plain.config.base_model_name_or_path, plain.config.revision
    _check_start(config)
    found = method_of(config)
    assert found is not None
    tensors = dict(plain.extras())
    for pair in plain.pairs():
        parts = _warm_parts(found, config, pair, seed)
        tensors |= {f"{ROOT}{pair.name}.mf_{method}_{part}": tensor for part, tensor in parts.items()}
    with staged(output) as place:
        write_tensors(place / WEIGHTS, tensors)
        with saving(place / CONFIG):
            config.save_pretrained(str(place))
        written = open_adapter(place)
        for layer, pair in zip(written.layers(), plain.pairs(), strict=True):
            _prove(found, layer.config, layer, pair)
    return output


def _settings(plain: PlainLora, method: str, heads: int) -> dict[str, Any]:
    """What the LoRA's config says, in the method's words."""
    same = (*KEPT, "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    words = {name: getattr(plain.config, name) for name in same if not name.startswith(("base_model", "revision"))}
    count = "num_modules" if method == "multilora" else "num_heads"
    return {name: value for name, value in words.items() if value is not None} | {count: heads}


def _check_start(config: Any) -> None:
    """Refuse starts whose heads or gate would not sum to the LoRA."""
    if (start := getattr(config, "router_init", "zero")) != "zero":
        raise ConfigError(
            f"router_init is {start!r}: heads that differ would be weighed unequally from the first step, and the "
            "outputs would not be the LoRA's. Leave router_init at 'zero'."
        )
    if getattr(config, "router_per", "layer") != "layer":
        raise ConfigError(
            "router_per is 'block', and which layer of a block comes first is not in a LoRA's files. Leave it at "
            "'layer'."
        )
    if config.init_weights is not True and config.init_weights != "paper":
        raise ConfigError(f"init_weights is {config.init_weights!r}; expanding needs the method's own start, True.")


def _warm_parts(method: Method, config: Any, pair: Pair, seed: int) -> dict[str, Tensor]:
    """One layer's tensors."""
    config = config.at(pair.name)
    r, alpha = rank_and_alpha(config, pair.name)
    shapes = method.shapes(config, r, pair.A.shape[1], pair.B.shape[0])
    parts = {name: torch.empty(shape) for name, shape in shapes.items()}
    method.fill(config, parts, torch.Generator().manual_seed(seed + zlib.crc32(pair.name.encode())))
    if pair.A.shape[0] != method.rank(config, r):
        raise ExportError(
            f"{pair.name} has rank {pair.A.shape[0]}, but the LoRA's config says {r}. Weights and config do not belong "
            "together; save the LoRA again."
        )
    EXPANDABLE[method.name](method, config, parts, pair.A, pair.B / method.scaling(config, r, alpha))
    return parts


def _copies(method: Method, config: Any, parts: dict[str, Tensor], A: Tensor, B: Tensor) -> None:
    """Every head is the LoRA's B: for gates that sum to 1 whatever they weigh."""
    parts["A"].copy_(A)
    parts["B"].copy_(B.repeat(1, method.heads(config)))


def _around_the_offset(method: Method, config: Any, parts: dict[str, Tensor], A: Tensor, B: Tensor) -> None:
    """Random heads around the LoRA's B; the offset takes their mean off."""
    heads = method.heads(config)
    parts["A"].copy_(A)
    parts["A0"], parts["B0"] = A.clone(), method.mean_head(config, parts).clone()
    share = heads if getattr(config, "reduce", "mean") == "sum" else 1
    parts["B"].add_((B / share).repeat(1, heads))


def _first_module(method: Method, config: Any, parts: dict[str, Tensor], A: Tensor, B: Tensor) -> None:
    """The LoRA is the first module, with scale 1; the others keep scale 0."""
    parts["A"][: A.shape[0]] = A
    parts["B"][:, : A.shape[0]] = B
    parts["scale"][0] = 1


EXPANDABLE: Mapping[str, Warm] = {
    "hydralora": _copies,
    "rlora": _around_the_offset,
    "mlora": _around_the_offset,
    "multilora": _first_module,
}
"""Method -> how a LoRA becomes its start."""


def _prove(method: Method, config: Any, layer: Layer, pair: Pair) -> None:
    """Send random inputs through the heads one by one, and through the LoRA."""
    parts = layer.parts
    x = torch.randn(4, pair.A.shape[1], generator=torch.Generator().manual_seed(0))
    logits = parts["router"] @ x.t() if "router" in parts else None
    gate = method.gate.weights(config, parts, logits, None)
    looped = ops.loop(
        torch.zeros(len(x), pair.B.shape[0]),
        x,
        parts["A"],
        None if gate is None else gate.t(),
        method.gate.fold(config, parts, parts["B"]),
        parts.get("A0"),
        parts.get("B0"),
        num_heads=method.heads(config),
        rank=layer.rank,
        scale=layer.scale,
    )
    off = float((looped - x @ pair.A.t() @ pair.B.t()).norm())
    terms = float(layer.scale * (x @ parts["A"].t()).norm() * parts["B"].norm())
    if not off <= 1e-5 * terms:
        raise ExportError(
            f"{layer.name}: the expanded adapter differs from the LoRA by {off:.1e}; nothing was written. Look for NaN "
            "in the LoRA; else please report it with its config."
        )
