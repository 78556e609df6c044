"""Every method, as a literal table. This file imports no torch, so that ``multiflora methods`` answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["METHODS", "MethodCard"]


@dataclass(frozen=True)
class MethodCard:
    """What a person needs to know to choose a method."""

    name: str
    """The word recipes use."""
    title: str
    line: str
    """The idea in one line."""
    paper: str
    settings: tuple[str, ...]
    """Its own settings, besides the shared ones (r, lora_alpha, target_modules, ...)."""
    merges: str
    """Whether the trained update is one weight matrix."""
    config: str | None
    """Name of its config class; None where the weights themselves are trained, which needs none."""
    module: str | None = None
    """Where it lives here; None for peft's own methods."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """What makes peft's class this method, e.g. ``{"use_dora": True}``."""
    learning_rate: float = 2e-4
    """What the method is usually trained with: taken where a recipe gives none, and where a search starts."""
    trains: Literal["adapter", "prompt", "weights", "factors"] = "adapter"
    """Small matrices beside linear layers, virtual tokens before the input, every weight of the model, or factors in
    the weights' place, of which a smaller model is made."""
    target_modules: str | None = "all-linear"
    """The modules that a recipe means when it names none; None: peft's own choice, or there is no such setting."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings that peft's class leaves open and that must have a value."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings that act on the training alone, with their defaults; the config class has none of them."""


METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        MethodCard(
            name="lora",
            title="LoRA",
            line="One low-rank update shared by all tasks: the baseline every other method has to beat.",
            paper="arXiv 2106.09685",
            settings=(),
            merges="exactly",
            config="LoraConfig",
        ),
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
        MethodCard(
            name="loraplus",
            title="LoRA+",
            line="LoRA whose B learns faster than its A.",
            paper="arXiv 2402.12354",
            settings=("loraplus_lr_ratio",),
            merges="exactly",
            config="LoraConfig",
            learning_rate=1e-4,
            training={"loraplus_lr_ratio": 16.0},
        ),
        MethodCard(
            name="rslora",
            title="rsLoRA",
            line="LoRA scaled by alpha over the root of the rank, so that high ranks still learn.",
            paper="arXiv 2312.03732",
            settings=(),
            merges="exactly",
            config="LoraConfig",
            preset={"use_rslora": True},
        ),
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
        ),
        MethodCard(
            name="prompt",
            title="Prompt tuning",
            line="Learned embeddings before the input.",
            paper="arXiv 2104.08691",
            settings=("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
            merges="no (virtual tokens)",
            config="PromptTuningConfig",
            learning_rate=3e-2,
            trains="prompt",
            target_modules=None,
            # peft's own start, noise of size one, lies far outside the embeddings a model knows
            defaults={"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
        ),
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
        MethodCard(
            name="multilora",
            title="MultiLoRA",
            line="n parallel LoRAs with learned scales that start at zero: many directions share the work.",
            paper="arXiv 2311.11501",
            settings=("num_modules", "scale_shape", "use_alpha"),
            merges="exactly",
            config="MultiLoraConfig",
            module="multiflora.methods.multilora",
        ),
        MethodCard(
            name="rlora",
            title="R-LoRA",
            line="One shared A, random heads B, a token router and dropout per head: heads learn different tasks.",
            paper="arXiv 2502.15455",
            settings=(
                "num_heads",
                "head_dropout",
                "gamma",
                "router_init",
                "top_k",
                "router_balance_loss",
                "router_z_loss",
            ),
            merges="no (token router)",
            config="RLoraConfig",
            module="multiflora.methods.rlora",
        ),
        MethodCard(
            name="mlora",
            title="M-LoRA",
            line="R-LoRA without its router: random heads averaged or summed.",
            paper="arXiv 2508.05078",
            settings=("num_heads", "head_dropout", "gamma", "reduce"),
            merges="exactly",
            config="MLoraConfig",
            module="multiflora.methods.mlora",
        ),
        MethodCard(
            name="hydralora",
            title="HydraLoRA",
            line="One shared A, heads B that start at zero, a token router.",
            paper="arXiv 2404.19245",
            settings=("num_heads", "top_k", "router_balance_loss", "router_z_loss"),
            merges="no (token router)",
            config="HydraLoraConfig",
            module="multiflora.methods.hydralora",
        ),
        MethodCard(
            name="moelora",
            title="MOELoRA",
            line="Low-rank experts blended by the task alone.",
            paper="arXiv 2310.18339",
            settings=("num_experts", "task_embedding_dim", "shared_gate"),
            merges="per task",
            config="MoeLoraConfig",
            module="multiflora.methods.moelora",
        ),
        MethodCard(
            name="loramoe",
            title="LoRAMoE",
            line="Whole LoRA experts behind a dense token router, with a localized balance loss.",
            paper="arXiv 2312.09979",
            settings=(
                "num_experts",
                "balance_weight",
                "balance_delta",
                "knowledge_tasks",
                "top_k",
                "router_balance_loss",
                "router_z_loss",
            ),
            merges="no (token router)",
            config="LoraMoeConfig",
            module="multiflora.methods.loramoe",
        ),
        MethodCard(
            name="mtllora",
            title="MTL-LoRA",
            line="A learned matrix per task between a shared A and heads blended by the task.",
            paper="arXiv 2410.09437",
            settings=("num_heads", "temperature", "task_matrix"),
            merges="per task",
            config="MtlLoraConfig",
            module="multiflora.methods.mtllora",
        ),
        MethodCard(
            name="mixlora",
            title="MixLoRA's routing",
            line="Whole LoRA experts of which a token router picks the best k, with a load-balance loss.",
            paper="arXiv 2404.15159",
            settings=("num_experts", "top_k", "router_balance_loss", "router_z_loss"),
            merges="no (token router)",
            config="MixLoraConfig",
            module="multiflora.methods.mixlora",
        ),
        MethodCard(
            name="alignlora",
            title="Align-LoRA",
            line="One LoRA, and a loss that keeps the tasks' A x alike.",
            paper="arXiv 2508.05078",
            settings=("align_weight",),
            merges="exactly",
            config="AlignLoraConfig",
            module="multiflora.methods.alignlora",
        ),
        MethodCard(
            name="loraga",
            title="LoRA-GA",
            line="LoRA that starts along the gradient of the whole weight.",
            paper="arXiv 2407.05000",
            settings=("gamma", "gradient_batches"),
            merges="exactly",
            config="LoraGaConfig",
            module="multiflora.methods.loraga",
        ),
        MethodCard(
            name="deltalora",
            title="Delta-LoRA",
            line="LoRA whose change the weight follows, kept as low-rank factors.",
            paper="arXiv 2309.02411",
            settings=("update_ratio", "start_step"),
            merges="exactly",
            config="DeltaLoraConfig",
            module="multiflora.methods.deltalora",
        ),
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
        MethodCard(
            name="parts",
            title="Parts",
            line="A sum of your own: any stem, heads, gate and offset, spelled out in the recipe.",
            paper="–",
            settings=(
                "num_heads",
                "stem",
                "heads",
                "gate",
                "offset",
                "head_dropout",
                "task_matrix",
                "router_init",
                "gamma",
                "scale_shape",
                "temperature",
                "task_embedding_dim",
                "top_k",
                "router_balance_loss",
                "router_z_loss",
            ),
            merges="depends (on the gate)",
            config="PartsConfig",
            module="multiflora.methods.parts",
        ),
    )
}
