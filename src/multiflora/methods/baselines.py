r"""Methods without a config class of ours: peft's own, the baselines every comparison has to have, and two besides.

Those are LoraHub, whose adapters are plain LoRAs, and LoSparse, which has no adapter. Each is one :class:`Baseline`:
its card, which tensors it trains (so that ranks can be solved for), which settings of peft it has no use for, and what
must hold among the others. What they need while they train is in `multiflora.training.baselines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiflora.errors import ConfigError
from multiflora.methods.method_card import MethodCard

if TYPE_CHECKING:
    from multiflora.compress.spec import CompressSpec

__all__ = ["BASELINES", "Baseline", "tokens_in_front", "virtual_tokens"]

Shapes = Callable[[Any, int, int, int], dict[str, tuple[int, ...]]]


def _pair(config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """LoRA's two factors."""
    return {"A": (r, d_in), "B": (d_out, r)}


def _pair_and_magnitude(config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """DoRA: the factors, and the length of each row of the weight."""
    return {**_pair(config, r, d_in, d_out), "magnitude": (d_out,)}


def _triplets(config: Any, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """AdaLoRA: the factors, and a singular value for each direction."""
    return {**_pair(config, r, d_in, d_out), "singular_values": (r, 1)}


def _same(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return settings


def _anything(settings: Mapping[str, Any]) -> None:
    """Whatever peft's own class takes."""


def _pissa_start(settings: Mapping[str, Any]) -> None:
    start = settings.get("init_lora_weights", "pissa")
    if not str(start).startswith("pissa"):
        raise ConfigError(
            f"method.init_lora_weights is {start!r}, but pissa starts by a singular value decomposition; write pissa "
            "(exact) or pissa_niter_16 (fast, by so many iterations), or choose the method lora."
        )


def _shrinks(settings: Mapping[str, Any]) -> None:
    start = settings.get("init_r", _INIT_R)
    end = settings.get("target_r", target_rank(start))
    if end >= start:
        raise ConfigError(
            f"method.init_r is {start} and method.target_r is {end}; adalora prunes ranks while it trains, so "
            "target_r must be less than init_r."
        )


def _nothing(settings: Mapping[str, Any]) -> None:
    """No config: every weight is trained."""


def _compression(settings: Mapping[str, Any]) -> CompressSpec:
    from multiflora.compress.spec import CompressSpec
    from multiflora.schema import build

    return build(CompressSpec, dict(settings), where="method", base=Path.cwd())


_INIT_R = 12


def target_rank(init_r: int) -> int:
    """The mean rank that AdaLoRA ends with where none is given: two thirds of the first, as in peft's 12 and 8."""
    return max(1, 2 * init_r // 3)


def _with_schedule(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """AdaLoRA's settings with what peft insists on; a training sets its own steps (`multiflora.training.baselines`)."""
    start = settings.get("init_r", _INIT_R)
    steps = settings.get("tinit", 0) + settings.get("tfinal", 0) + 1
    return {"total_step": steps, "target_r": target_rank(start), **settings}


@dataclass(frozen=True)
class Baseline:
    """One of these methods, as a value."""

    card: MethodCard
    shapes: Shapes | None = None
    """(config, r, d_in, d_out) -> the trainable tensors of one adapted layer; None where no rank decides them."""
    rank_key: str = "r"
    """Name of the setting that is the rank."""
    alpha_key: str | None = "lora_alpha"
    """Name of the setting that over the rank scales the update; None where nothing does."""
    unused: frozenset[str] = field(default_factory=frozenset)
    """Fields of peft's class that are not for users: without effect on this method, or set by the training."""
    check: Callable[[Mapping[str, Any]], None] = _anything
    """Refuses settings that peft would take and that cannot work together; each by itself is looked at before."""
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _same
    """Adds settings that follow from the others."""
    plan: Callable[[Mapping[str, Any]], Any] = _nothing
    """What stands for the config where peft has no class for it."""
    shrinks: str = ""
    """What it takes away until its training ends, if anything: an earlier state is larger than what was asked for."""
    cannot_go_on: str = ""
    """Why no training starts from an adapter of an earlier run, and what to do instead; empty where one does."""

    @property
    def name(self) -> str:
        """The word recipes use."""
        return self.card.name


# what a prompt learner's config knows of the model, filled in by peft; modules_to_save and the like do not exist there
_OF_MODEL = frozenset({"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"})

# what makes a LoRA more than two factors a layer: LoraHub weighs factors, and nothing else
_MORE_THAN_A_PAIR = frozenset(
    {
        "bias",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "use_dora",
        "init_lora_weights",
    }
)

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            MethodCard(
                name="lora",
                title="LoRA",
                line="One low-rank update shared by all tasks: the baseline every other method has to beat.",
                paper="arXiv 2106.09685",
                settings=(),
                merges="exactly",
                experts="with target_parameters",
                config="LoraConfig",
            ),
            _pair,
        ),
        Baseline(
            MethodCard(
                name="loraplus",
                title="LoRA+",
                line="LoRA whose B learns faster than its A.",
                paper="arXiv 2402.12354",
                settings=("loraplus_lr_ratio",),
                merges="exactly",
                experts="with target_parameters",
                config="LoraConfig",
                learning_rate=1e-4,
                training={"loraplus_lr_ratio": 16.0},
            ),
            _pair,
        ),
        Baseline(
            MethodCard(
                name="rslora",
                title="rsLoRA",
                line="LoRA scaled by alpha over the root of the rank, so that high ranks still learn.",
                paper="arXiv 2312.03732",
                settings=(),
                merges="exactly",
                experts="with target_parameters",
                config="LoraConfig",
                preset={"use_rslora": True},
            ),
            _pair,
        ),
        Baseline(
            MethodCard(
                name="dora",
                title="DoRA",
                line="LoRA turns the weight's rows, and each row learns a length.",
                paper="arXiv 2402.09353",
                settings=(),
                merges="exactly",
                config="LoraConfig",
                preset={"use_dora": True},
            ),
            _pair_and_magnitude,
        ),
        Baseline(
            MethodCard(
                name="pissa",
                title="PiSSA",
                line="LoRA that starts at the weight's own largest directions.",
                paper="arXiv 2404.02948",
                settings=("init_lora_weights",),
                merges="exactly",
                config="LoraConfig",
                defaults={"init_lora_weights": "pissa"},
            ),
            _pair,
            check=_pissa_start,
        ),
        Baseline(
            MethodCard(
                name="adalora",
                title="AdaLoRA",
                line="LoRA in singular directions; the least important are pruned while it trains.",
                paper="arXiv 2303.10512",
                settings=("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
                merges="exactly",
                config="AdaLoraConfig",
                learning_rate=1e-3,
            ),
            _triplets,
            rank_key="init_r",
            unused=frozenset({"r", "total_step", "rank_pattern"}),
            check=_shrinks,
            complete=_with_schedule,
            shrinks="ranks",
            cannot_go_on=(
                "begins with all its directions, of which a saved adapter has lost some. Plan one longer run instead"
            ),
        ),
        Baseline(
            MethodCard(
                name="ia3",
                title="IA³",
                line="Learned scales of keys, values and what enters the last feed-forward layer.",
                paper="arXiv 2205.05638",
                settings=("feedforward_modules", "init_ia3_weights"),
                merges="exactly",
                config="IA3Config",
                learning_rate=3e-3,
                target_modules=None,
            )
        ),
        Baseline(
            MethodCard(
                name="prompt",
                title="Prompt tuning",
                line="Learned embeddings before the input.",
                paper="arXiv 2104.08691",
                settings=(
                    "num_virtual_tokens",
                    "prompt_tuning_init",
                    "prompt_tuning_init_text",
                    "tokenizer_name_or_path",
                ),
                merges="no (virtual tokens)",
                config="PromptTuningConfig",
                learning_rate=3e-2,
                trains="prompt",
                target_modules=None,
                # peft's own start, noise of size one, lies far outside the embeddings a model knows
                defaults={"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
            ),
            unused=_OF_MODEL,
        ),
        Baseline(
            MethodCard(
                name="prefix",
                title="Prefix tuning",
                line="Learned keys and values before the input, in every layer.",
                paper="arXiv 2101.00190",
                settings=("num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "init_weights"),
                merges="no (virtual tokens)",
                config="PrefixTuningConfig",
                learning_rate=1e-2,
                trains="prompt",
                target_modules=None,
                defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
            ),
            unused=_OF_MODEL,
        ),
        Baseline(
            MethodCard(
                name="ptuning",
                title="P-tuning",
                line="Learned embeddings before the input, made by a small network.",
                paper="arXiv 2103.10385",
                settings=("num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size"),
                merges="no (virtual tokens)",
                config="PromptEncoderConfig",
                learning_rate=1e-3,
                trains="prompt",
                target_modules=None,
                defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
            ),
            unused=_OF_MODEL,
            cannot_go_on=(
                "saves what its network gives and not the network, so there is none to train on. Take method prompt"
            ),
        ),
        Baseline(
            MethodCard(
                name="full",
                title="Full fine-tuning",
                line="Every weight is trained and a whole model is saved.",
                paper="–",
                settings=(),
                merges="exactly",
                config=None,
                learning_rate=2e-5,
                trains="weights",
                target_modules=None,
            ),
            cannot_go_on=(
                "trains the model itself. Name the folder of the earlier run as the model instead (model: FOLDER)"
            ),
        ),
        Baseline(
            MethodCard(
                name="lorahub",
                title="LoraHub",
                line="A LoRA for each task, put together with weights searched on a few examples.",
                paper="arXiv 2307.13269",
                settings=("examples", "budget"),
                merges="exactly",
                config="LoraConfig",
                training={"examples": 5, "budget": 40},
            ),
            _pair,
            unused=_MORE_THAN_A_PAIR,
            cannot_go_on=(
                "trains a LoRA of its own for each task. Go on with method lora from an adapter that it has made"
            ),
        ),
        Baseline(
            MethodCard(
                name="losparse",
                title="LoSparse",
                line="Every weight becomes a low-rank part and the rows that matter of the rest: a smaller model.",
                paper="arXiv 2306.11222",
                settings=("low_rank", "keep", "start", "end", "every", "beta1", "beta2"),
                merges="exactly",
                config=None,
                learning_rate=9e-5,
                trains="factors",
                target_modules=None,
                training={
                    "low_rank": 0.05,
                    "keep": 0.15,
                    "start": 0.05,
                    "end": 0.3,
                    "every": 10,
                    "beta1": 0.85,
                    "beta2": 1.0,
                },
            ),
            plan=_compression,
            shrinks="rows of its weights",
            cannot_go_on=(
                "makes a new, smaller model of the base model, and starts from that alone. Leave init_from out"
            ),
        ),
    )
}


def virtual_tokens(model: Any) -> int:
    """How many learned tokens a model has before its input; they take their part of its context.

    Args:
        model: Any model, wrapped by peft or not.

    Example:
        >>> virtual_tokens(object())
        0
    """
    config = getattr(model, "active_peft_config", None) if getattr(model, "peft_config", None) else None
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def tokens_in_front(model: Any) -> int:
    """How many positions a model's output has before those of its input.

    Those of a learned prompt; prefix tuning has none, as its tokens are keys and values only.

    Args:
        model: Any model, wrapped by peft or not.

    Example:
        >>> tokens_in_front(object())
        0
    """
    count = virtual_tokens(model)
    return 0 if count and model.active_peft_config.peft_type == "PREFIX_TUNING" else count
