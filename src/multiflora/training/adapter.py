"""The adapter: put on the base model as the recipe says, and saved so that it is whole and proven readable."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from multiflora.adapter_folder import check_adapter
from multiflora.adapter_tensors import method_of
from multiflora.base_model import empty_model, load_config
from multiflora.compress.layer import compressed_layers, sparsify
from multiflora.compress.saved import save_compressed
from multiflora.compress.spec import CompressSpec
from multiflora.context import task
from multiflora.errors import AdapterError, ConfigError, MultifloraError
from multiflora.machine import memory_total, size_words
from multiflora.methods import METHODS, build_config
from multiflora.methods.fused import LEFT_OUT, left_out
from multiflora.patterns import pattern_problems
from multiflora.recipe import Recipe
from multiflora.suggest import shown
from multiflora.tied import check_tied, tied_modules
from multiflora.training.baselines import adalora_steps
from multiflora.training.course import check_method
from multiflora.training.objective import check_objective, check_output_layer
from multiflora.training.precision import weights_of
from multiflora.training.processes import is_first_process, is_sharded
from multiflora.training.sharded import adapter_tensors

__all__ = [
    "adapted_on_meta",
    "adapter_config",
    "add_adapter",
    "check_answers",
    "check_saving",
    "is_saved_otherwise",
    "notes_on",
    "parameter_counts",
    "probe",
    "put_on",
    "save_adapter",
    "start_of",
    "takes_start_off",
]


def add_adapter(model: Any, recipe: Recipe, *, low_cpu_mem_usage: bool = False) -> Any:
    """Put the recipe's adapter on a base model; its start is drawn from the recipe's seed.

    Methods of ours learn the names of the tasks here, so that they can route by task. Full fine-tuning has no adapter:
    the model itself is returned, with every weight to be trained; LoSparse puts factors in its weights' place.

    Args:
        model: The base model, which is not written to (but by those two, and while it trains by PiSSA, see
            `start_of`).
        recipe: Its ``method``, ``tasks``, ``seed`` and ``train.packing`` are read.
        low_cpu_mem_usage: Make the adapter on the meta device, where it has shapes and no values.
    Raises:
        ConfigError: The settings do not fit the method, the model or packing.
    """
    config = adapter_config(recipe)
    if not low_cpu_mem_usage:
        _check_size(model, config)
    torch.manual_seed(recipe.seed)
    for problem in pattern_problems(recipe.method.settings, (name for name, _ in model.named_modules())):
        raise ConfigError(f"method.{problem}")
    method = method_of(config)
    if method is not None and "B" in method.frozen(config) and config.heads == "zero" and recipe.init_from is None:
        raise ConfigError(
            "method.frozen holds 'B', and the heads B start at zero, so nothing would change. Start from an adapter "
            "with trained heads, such as `multiflora compose --route` makes (init_from: FOLDER), or leave B out."
        )
    for word in getattr(config, "target_parameters", None) or ():
        if not any(name.endswith(word) for name, _ in model.named_parameters()):
            raise ConfigError(f"method.target_parameters holds {shown(word)}, and no parameter's name ends in that.")
    try:
        adapted = put_on(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        if isinstance(error, MultifloraError):
            raise
        raise ConfigError(
            f"method: {recipe.method.name} cannot be put on {type(model).__name__}: {str(error)[:300]} "
            "Check method.target_modules."
        ) from error
    check_output_layer(adapted, recipe)
    return adapted


def adapted_on_meta(recipe: Recipe) -> Any:
    """The recipe's model with the recipe's adapter, where both have shapes and no values; see `add_adapter`."""
    spec = recipe.model
    model = empty_model(load_config(spec), dtype=weights_of(recipe), remote=spec.trust_remote_code)
    return add_adapter(model, recipe, low_cpu_mem_usage=True)


def put_on(model: Any, config: Any, *, low_cpu_mem_usage: bool = False) -> Any:
    """Put an adapter on a model, or have every weight of it trained where there is no config.

    Args:
        model: The base model.
        config: The adapter's ``peft.PeftConfig``, or LoSparse's settings, or None.
        low_cpu_mem_usage: Make the adapter on the meta device.
    """
    if config is None:
        return model.requires_grad_(True)
    if isinstance(config, CompressSpec):
        sparsify(model, config.low_rank)
        return model
    if low_cpu_mem_usage and takes_start_off(config):
        # shapes alone are wanted, and a decomposition of weights without values has none
        config = dataclasses.replace(config, init_lora_weights=True)
    tied = tied_modules(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LEFT_OUT)  # a run tells it among its notes, for peft's methods, too
        adapted = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    check_tied(adapted, tied)
    if low_cpu_mem_usage:
        # on the meta device parameters are made anew, and AdaLoRA's count of ranks forgets that it is not trained
        for name, parameter in adapted.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)
    return adapted


def notes_on(model: Any, recipe: Recipe) -> list[str]:
    """What the recipe's adapter leaves out of the model although its words sound as if it did not, a sentence each."""
    if getattr(adapter_config(recipe), "target_modules", None) != "all-linear" or not isinstance(model, PeftModel):
        return []
    tuner: Any = model.base_model
    note = left_out(model.get_base_model(), tuner.targeted_parameter_names)
    return [note] if note else []


def _check_size(model: Any, config: Any) -> None:
    """Refuse an adapter one layer of which would not fit, before memory is taken for it."""
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if not widths:
        return
    d_in, d_out = min(widths, key=sum)
    method = method_of(config)
    shapes: Iterable[tuple[int, ...]] = [(rank, d_in), (d_out, rank)]
    if method is not None:
        shapes = method.shapes(config.at_most(), rank, d_in, d_out).values()
    needed, there = 4 * sum(math.prod(shape) for shape in shapes), memory_total()
    if needed > there:
        raise ConfigError(
            f"method: with r = {rank:,} the adapter of a single layer of {d_in} x {d_out} would take "
            f"{size_words(needed)}, and this machine has {size_words(there)}. Give a smaller r, or fewer heads."
        )


def adapter_config(recipe: Recipe) -> Any:
    """Return the config of a recipe's method; cheap, so that a run is refused before it reads or scores anything.

    Args:
        recipe: Its ``method``, ``tasks`` and ``train`` are read.
    Returns:
        The config; see `multiflora.methods.build_config`.
    Raises:
        ConfigError: A setting is unknown or out of range, or does not go with how it shall be trained.
    """
    name, train = recipe.method.name, recipe.train
    check_objective(recipe)
    config = build_config(name, _settings(recipe))
    if train.packing and getattr(config, "balance_weight", None):
        raise ConfigError(
            f"train.packing is true and method.balance_weight is {config.balance_weight}; that loss balances the "
            "experts over rows of one example each, and packing puts several into a row. Set one of the two to "
            "false or 0."
        )
    if train.packing and METHODS[name].trains == "prompt":
        raise ConfigError(
            f"train.packing is true, but {name} puts its virtual tokens before each row, and packing puts several "
            "examples into one. Set train.packing to false; batches are then grouped by length."
        )
    if train.gradient_checkpointing and name == "prefix":
        raise ConfigError(
            "train.gradient_checkpointing is true, but prefix tuning works through the cache of keys and values, which "
            "checkpointing switches off. Set it to false."
        )
    if str(getattr(config, "init_lora_weights", "")).lower() == "loftq":
        raise ConfigError(
            "method.init_lora_weights is 'loftq', which rounds the base model's weights; the adapter would fit that "
            "rounded model, which is not saved, and no other. Load a quantised base model, or choose another start."
        )
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start in ("eva", "corda"):
        raise ConfigError(
            f"method.init_lora_weights is {start!r}, which looks at data before the training; a recipe has no place "
            "for that, and without it the start would be another one. Take method: loraga, which does look, or pissa."
        )
    if getattr(config, "task_type", None) not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"method.task_type is {config.task_type!r}, but what is trained here is a causal language model. Leave it "
            "out."
        )
    check_method(name, recipe.evaluate)
    if name == "adalora" and train.max_steps is not None:
        adalora_steps(recipe.method.settings, train.max_steps)
    method = method_of(config)
    if method is not None and method.shared(config) and is_sharded():
        apart = "method.shared_gate to false" if name == "moelora" else "method.router_per to layer"
        raise ConfigError(
            f"method is {name}, whose layers share one gate, and the weights are spread over processes (FSDP or "
            f"ZeRO-3), which gather one layer at a time. Set {apart}, or start it with whole copies (DDP)."
        )
    if METHODS[name].trains == "factors" and is_sharded():
        raise ConfigError(
            f"method is {name}, whose rows compete over all layers, and the weights are spread over processes (FSDP or "
            "ZeRO-3), of which each sees a part. Start it on one device, or with as many whole copies (DDP)."
        )
    return config


def _settings(recipe: Recipe) -> Mapping[str, Any]:
    """Return the method's settings with its task type, and for methods of ours the names of the tasks."""
    card = METHODS[recipe.method.name]
    known: dict[str, Any] = {} if card.config is None else {"task_type": "CAUSAL_LM"}
    if card.module is not None:
        known |= {"num_tasks": len(recipe.tasks), "task_names": [task.name for task in recipe.tasks]}
    return known | recipe.method.settings


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return how many parameters a model trains, and how many it has."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()  # knows what is quantised or sharded
        return int(trainable), int(total)
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def takes_start_off(config: Any) -> bool:
    """Whether the start of a LoRA is taken off the base weight, as PiSSA's is."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(("pissa", "olora", "corda", "lora_ga"))


def is_saved_otherwise(model: Any) -> bool:
    """Whether an adapter is saved in another form than it was trained in, so that both agree up to rounding only.

    PiSSA's base lacks what the adapter took from it; AdaLoRA's pruned directions are kept as zeros while it trains;
    LoSparse's factors are float32 while they train, whatever the model is saved in.
    """
    if not isinstance(model, PeftModel):
        return bool(compressed_layers(model))
    return takes_start_off(model.active_peft_config) or model.active_peft_config.peft_type == "ADALORA"


def start_of(model: Any) -> dict[str, torch.Tensor] | None:
    r"""Copy what a PiSSA adapter starts from, or another that changes the base model; None for all others.

    PiSSA (OLoRA, CorDA, peft's LoRA-GA) takes its start off the base weight, :math:`W - s B_0 A_0`, so its factors
    alone mean nothing on the pristine model. With the start at hand `save_adapter` writes the difference
    :math:`s (B A - B_0 A_0)`, a plain LoRA of twice the rank for the model as it was.

    Args:
        model: A model with an adapter that has not been trained yet.
    """
    if not isinstance(model, PeftModel) or not takes_start_off(model.active_peft_config):
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def check_saving(model: Any, start: Mapping[str, torch.Tensor] | None) -> None:
    """Save an adapter that is not trained yet, and look at what was written: what fails here would lose the training.

    Args:
        model: The model with its adapter; one that is trained whole is passed over.
        start: What `start_of` gave.
    Raises:
        ConfigError: The adapter cannot be saved, or what was saved would be refused when it is loaded.
    """
    if not isinstance(model, PeftModel):
        return
    held = adapter_tensors(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            expected = _write(model, folder, held, start)
            _compare(_read_all(folder), expected, folder)
            check_adapter(folder)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"method: the adapter that these settings make could not be saved and loaded again, so the training "
                f"would be lost at its end: {str(error) or type(error).__name__} Change the setting that it names."
            ) from error


@torch.no_grad()
def probe(model: Any) -> torch.Tensor:
    """Return the logits of one made-up row, to tell whether two models are the same; of the first task."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 17) * 7919 % vocabulary)[None].to(next(model.parameters()).device)
    with task(model, 0):
        logits: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float().cpu()


def check_answers(trained: torch.Tensor, loaded: torch.Tensor, folder: Path, *, exact: bool) -> None:
    """Check that what was saved, on a fresh base model, answers as the trained model did.

    Args:
        trained: The trained model's `probe`.
        loaded: That of the loaded one.
        folder: Where the adapter was saved.
        exact: Whether it was saved in the form it was trained in, see `is_saved_otherwise`.
    Raises:
        AdapterError: It does not.
    """
    off = float((loaded - trained).norm() / trained.norm())
    bound = 1e-3 if exact else 5e-2  # both forms agree up to the rounding of the base model's weights
    if not off <= bound:
        raise AdapterError(
            f"The adapter saved to {folder} answers otherwise than the model that was trained: its logits on a fresh "
            f"base model are off by {off:.1%} (at most {bound:.1%} is rounding). Do not use it; the last checkpoint "
            "holds what was trained. Please report the recipe's method settings."
        )


def save_adapter(model: Any, folder: Path, *, start: Mapping[str, torch.Tensor] | None = None) -> None:
    """Save the adapter as safetensors, read it back, and only then put it in place.

    So ``folder`` never holds half an adapter, and never one that lacks a tensor, as saving under sharded training has
    produced elsewhere without a word. All processes call it, to hand in their parts; the first one writes. A fully
    fine-tuned model is saved whole, in the same way, and one of LoSparse's in its own form.

    Args:
        model: A model with one adapter, or one without any that was trained whole.
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
        start: What `start_of` gave before the training.
    Raises:
        AdapterError: What was read back is not what was saved.
    """
    is_compressed = not isinstance(model, PeftModel) and bool(compressed_layers(model))
    held = {} if is_compressed else adapter_tensors(model)  # LoSparse is never spread over processes
    if not is_first_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        if is_compressed:
            save_compressed(model, scratch)  # which compares what it reads back itself
        else:
            expected = _write(model, scratch, held, start)
            _compare(_read_all(scratch), expected, folder)
        for path in scratch.glob("*.*"):
            if path.suffix in (".safetensors", ".json"):
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(
    model: Any, folder: Path, held: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor] | None
) -> Mapping[str, torch.Tensor]:
    """Save an adapter, or a model that was trained whole, and return what must be found there."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=dict(held))
        return held
    model.save_pretrained(str(folder), safe_serialization=True, state_dict=dict(held))
    expected: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=dict(held))
    if start is None:
        return expected
    expected = _difference(expected, start)
    save_file(expected, folder / "adapter_model.safetensors")
    _of_twice_the_rank(model.active_peft_config).save_pretrained(str(folder))
    return expected


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, in one file or in shards."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _difference(held: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""The factors of :math:`B A - B_0 A_0`: A over A0, and B beside -B0.

    Whatever else is trained (biases, lengths of DoRA, modules and tokens that are saved whole) stands for itself.
    """
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        mine = tensor.cpu()
        if name.endswith(("lora_A.weight", "lora_embedding_A")):
            joined[name] = torch.cat([mine, start[name]], 0)
        elif name.endswith(("lora_B.weight", "lora_embedding_B")):
            joined[name] = torch.cat([mine, -start[name]], 1)
        else:
            joined[name] = mine.contiguous()
    return joined


def _of_twice_the_rank(config: Any) -> Any:
    """The config of a plain LoRA of twice the rank and the same scale s, for `_difference`."""
    more = 2**0.5 if config.use_rslora else 2  # alpha over the root of the rank, or over the rank
    return dataclasses.replace(
        config,
        init_lora_weights=True,
        inference_mode=True,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={key: more * alpha for key, alpha in (config.alpha_pattern or {}).items()},
    )


def _compare(saved: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Check that every tensor of the adapter was saved, bit for bit."""
    missing = sorted(held.keys() - saved.keys())
    changed = sorted(name for name in held.keys() & saved.keys() if not torch.equal(saved[name], held[name].cpu()))
    if missing or changed or not saved:
        raise AdapterError(
            f"The adapter saved to {folder} differs from the trained one: {len(missing)} of {len(held)} tensors are "
            f"missing and {len(changed)} are changed (first: {(missing + changed or ['none were saved'])[0]}). It was "
            "not put in place. Save again, on another disk if it recurs."
        )
