r"""What a method costs, from its description alone, and the rank at which it costs what another does.

Per adapted layer, with the shapes :math:`\theta` of a method's trainable tensors:

.. math::
    P = \sum_\theta |\theta|, \qquad
    F = 2\,(|A| + |B| + |R|) + 2 r^2\,[\text{matrix per task}] + H r\,[\text{gate}]
        + 2 k\,(d_{in}+d_{out})\,[\text{frozen term of rank } k]

floating-point operations per token forward (a multiply-add counts as two). Training takes that again twice, for the
gradients of the input and of the weight; the frozen offset needs only the first. What is done once a step and not once
a token (folding MultiLoRA's scales, DoRA's norms) is left out: it vanishes beside thousands of tokens.

The base model's own operations are the same for every adapter, so equal operations of adapters are equal operations of
training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import lcm, prod, sqrt
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from peft.utils.other import get_pattern_key

from multiflora.errors import ConfigError
from multiflora.methods import METHODS, build_config, describe
from multiflora.methods.baselines import Baseline
from multiflora.methods.per_layer import head_counts

if TYPE_CHECKING:
    from multiflora.methods.base import Method

__all__ = [
    "Flops",
    "Solved",
    "Width",
    "adapted_widths",
    "count_flops",
    "count_on_meta",
    "count_parameters",
    "has_rank",
    "rank_key",
    "solve_rank",
    "with_rank",
]

Equal = Literal["parameters", "flops"]

# tensors that multiply every token: two operations for each of their numbers
_PER_TOKEN = ("A", "B", "router", "stem_router", "core", "core_router")


class Width(NamedTuple):
    """One linear layer that is adapted."""

    name: str
    """Its path in the model, for settings by pattern."""
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations that an adapter adds, for each token."""

    forward: int
    """A forward pass."""
    training: int
    """Forward and backward pass."""


@dataclass(frozen=True)
class Solved:
    """Settings whose rank meets a budget, and what they come to."""

    settings: Mapping[str, Any]
    """The settings with the rank (and alpha) put in."""
    rank: int
    parameters: int
    """Trainable parameters."""
    flops: Flops


def rank_key(method: Method | Baseline) -> str:
    """Name of the setting that is the method's rank."""
    return method.rank_key if isinstance(method, Baseline) else "r"


def has_rank(name: str) -> bool:
    """Whether a method's size is set by a rank, so that it can be solved for."""
    return describe(name).shapes is not None


def count_parameters(method: Method | Baseline, config: Any, widths: Iterable[Width]) -> int:
    """Count the trainable parameters of an adapter.

    Args:
        method: Its description.
        config: Its peft config; ``rank_pattern`` and heads by layer are heeded.
        widths: The layers it adapts.

    Raises:
        ConfigError: No rank decides the method's size (prompt tuning, say): count on the model.

    Example:
        >>> count_parameters(describe("lora"), build_config("lora", {"r": 8}), [Width("q_proj", 4096, 4096)])
        65536
    """
    described, total, held = _described(method, config), 0, set[str]()
    for layer in widths:
        shared = _held_elsewhere(described, config, layer, held)
        for part, shape in _shapes(method, config, layer).items():
            if part not in _frozen(described, config) and part not in shared:
                total += prod(shape)
    return total


def count_flops(method: Method | Baseline, config: Any, widths: Iterable[Width]) -> Flops:
    """Count the operations that an adapter adds for each token; see the module's formula.

    Args:
        method: Its description.
        config: Its peft config.
        widths: The layers it adapts.

    Raises:
        ConfigError: No rank decides the method's size.
    """
    learned = frozen = 0
    method, held = _described(method, config), set[str]()
    for layer in widths:
        shapes = _shapes(method, config, layer)
        shared = _held_elsewhere(method, config, layer, held)
        for name in _PER_TOKEN:
            cost = 2 * prod(shapes[name]) if name in shapes and name not in shared else 0
            if name in _frozen(method, config):
                frozen += cost
            else:
                learned += cost
        learned += shapes.get("magnitude", (0,))[0]
        if isinstance(method, Baseline):
            continue
        own = config.at(layer.name)
        r = method.rank(own, _rank(method, config, layer))
        frozen_rank = method.frozen_rank(own, _rank(method, config, layer))
        learned += 2 * r * r if "task_matrix" in shapes else 0
        learned += method.heads(own) * r if method.gate.reads != "nothing" else 0
        frozen += 2 * frozen_rank * (layer.d_in + layer.d_out)
    return Flops(forward=learned + frozen, training=3 * learned + 2 * frozen)


def solve_rank(
    name: str,
    settings: Mapping[str, Any],
    widths: Sequence[Width],
    target: int,
    *,
    equal: Equal = "parameters",
    scale: float | None = None,
) -> Solved:
    """Find the rank at which a method costs nearest to a target.

    The factor s that scales the update (alpha/r, or alpha/√r with ``use_rslora``) is a setting of its own, as much as
    the learning rate is: alpha follows the rank, so that s stays what ``scale`` or the method's defaults say. Where
    ``lora_alpha`` is among the settings, it is left as it is.

    Args:
        name: The method.
        settings: Its settings without the rank.
        widths: The layers it adapts.
        target: Trainable parameters, or operations per training token.
        equal: Which of the two ``target`` is.
        scale: s; None: the method's default alpha over its default rank.

    Raises:
        ConfigError: The method has no rank, or a setting cannot work.

    Example:
        >>> layers = [Width("up_proj", 64, 256)]
        >>> solve_rank("hydralora", {"num_heads": 3}, layers, target=4000).rank
        5
    """
    method = describe(name)
    if method.shapes is None:
        raise ConfigError(f"{name} has no rank that could be solved for; give its settings, and budget.equal: nothing.")

    def built(rank: int) -> tuple[dict[str, Any], Any, int]:
        given = with_rank(name, settings, rank, scale)
        config = build_config(name, given)
        if equal == "parameters":
            return given, config, count_parameters(method, config, widths)
        return given, config, count_flops(method, config, widths).training

    # ranks come in steps: experts that share one rank take a multiple of their number
    step = 1 if isinstance(method, Baseline) else _step(method, settings)
    below, above = 1, 2
    while built(above * step)[2] < target:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if built(middle * step)[2] < target else (below, middle)
    rank = min((below, above), key=lambda k: abs(built(k * step)[2] - target)) * step
    found, config, _ = built(rank)
    return Solved(found, rank, count_parameters(method, config, widths), count_flops(method, config, widths))


def with_rank(name: str, settings: Mapping[str, Any], rank: int, scale: float | None = None) -> dict[str, Any]:
    """Put a rank into settings, and the alpha that keeps the update's scale; see `solve_rank`.

    Example:
        >>> with_rank("lora", {}, 32, scale=2.0)
        {'r': 32, 'lora_alpha': 64.0}
    """
    method = describe(name)
    r, alpha = rank_key(method), method.alpha_key if isinstance(method, Baseline) else "lora_alpha"
    if alpha is None or alpha in settings:
        return {**settings, r: rank}
    defaults = vars(default_config(name)) | settings
    root = sqrt if defaults.get("use_rslora") else float
    s = scale if scale is not None else defaults[alpha] / root(defaults[r])
    return {**settings, r: rank, alpha: s * root(rank)}


def default_config(name: str) -> Any:
    """The method's config as it is when nothing is set."""
    return build_config(name, {})


def adapted_widths(
    model_config: Any, settings: Mapping[str, Any], *, trust_remote_code: bool = False, by_peft: bool = False
) -> list[Width]:
    """List the layers that settings such as ``target_modules`` choose, from a model's config, without its weights.

    Args:
        model_config: The model's transformers config.
        settings: A method's settings; only those that choose modules are read.
        trust_remote_code: Let the config name classes outside transformers.
        by_peft: Whether the method is one of peft's own, which may adapt more than linear layers by the same words.

    Raises:
        ConfigError: They choose no layer, or more than layers.
    """
    from peft import get_peft_model

    from multiflora.base_model import empty_model
    from multiflora.peft_bridge import layer_widths

    words = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    chosen = {"target_modules": "all-linear", **{key: settings[key] for key in words if key in settings}}
    empty = empty_model(model_config, remote=trust_remote_code)
    try:
        model = get_peft_model(empty, build_config("lora", {"r": 1, **chosen}), low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"method.target_modules is {chosen['target_modules']!r}: {error}") from error
    base = model.get_base_model()
    names = model.base_model.targeted_module_names
    if by_peft and model.base_model.targeted_parameter_names:
        raise ConfigError(
            f"method.target_modules is {chosen['target_modules']!r}, by which peft's LoRA takes the experts of this "
            "mixture along, and our methods do not: they would not train alike. Name modules of attention alone, such "
            "as compare.shared.target_modules=[q_proj, v_proj]."
        )
    return [Width(name, *layer_widths(base.get_submodule(name).get_base_layer())) for name in names]


def count_on_meta(model_config: Any, name: str, settings: Mapping[str, Any], *, trust_remote_code: bool = False) -> int:
    """Count a method's trainable parameters on the model itself, without storage for a weight.

    Args:
        model_config: The model's transformers config.
        name: The method.
        settings: Its settings.
        trust_remote_code: Let the config name classes outside transformers.
    """
    from multiflora.base_model import empty_model
    from multiflora.estimate import count_parameters as count_on_model
    from multiflora.training.adapter import put_on

    model = empty_model(model_config, remote=trust_remote_code)
    kind = {} if METHODS[name].config is None else {"task_type": "CAUSAL_LM"}
    config = build_config(name, kind | dict(settings))
    return count_on_model(put_on(model, config, low_cpu_mem_usage=True))[0]


def _shapes(method: Method | Baseline, config: Any, layer: Width) -> dict[str, tuple[int, ...]]:
    if method.shapes is None:
        raise ConfigError(f"No rank decides the size of {method.name}; count the parameters on the model.")
    described = _described(method, config)
    assert described.shapes is not None
    own = config if isinstance(described, Baseline) else config.at(layer.name)
    return described.shapes(own, _rank(method, config, layer), layer.d_in, layer.d_out)


def _described(method: Method | Baseline, config: Any) -> Method | Baseline:
    """The description that holds for the config."""
    return method if isinstance(method, Baseline) else method.of(config)


def _held_elsewhere(method: Method | Baseline, config: Any, layer: Width, held: set[str]) -> tuple[str, ...]:
    """Tensors that an earlier layer of the same group holds for this one; `held` are the groups seen so far."""
    if isinstance(method, Baseline) or not (shared := method.shared(config)):
        return ()
    group = method.group(config, layer.name)
    first = group not in held
    held.add(group)
    return () if first else shared


def _frozen(method: Method | Baseline, config: Any) -> tuple[str, ...]:
    """Tensors that are there and not trained."""
    return () if isinstance(method, Baseline) else method.frozen(config)


def _rank(method: Method | Baseline, config: Any, layer: Width) -> int:
    """The rank of one layer: by pattern, or the config's."""
    patterns = getattr(config, "rank_pattern", None) or {}
    rank: int = patterns.get(get_pattern_key(list(patterns), layer.name), getattr(config, rank_key(method)))
    return rank


def _step(method: Method, settings: Mapping[str, Any]) -> int:
    """The smallest rank that gives every branch one, in each layer; ranks are its multiples."""
    default = default_config(method.name)
    # no config: with the default rank, this number of experts may be refused
    given = SimpleNamespace(**vars(default) | {"heads_setting": default.heads_setting} | settings)
    least = []
    for heads in head_counts(given) or [1]:
        one = SimpleNamespace(**vars(given) | {default.heads_setting: heads})
        least.append(next(r for r in count(1) if method.rank(one, r) >= 1))
    return lcm(*least)
