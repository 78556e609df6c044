"""A training that starts from an adapter of an earlier run: the same method in the same shape, task by task by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from multiflora.adapter_folder import WEIGHTS, check_adapter
from multiflora.adapter_tensors import CONFIG, method_of
from multiflora.embedded import HUB_NAME
from multiflora.errors import AdapterError, ConfigError
from multiflora.methods import METHODS
from multiflora.methods.baselines import BASELINES
from multiflora.peft_bridge import STEM
from multiflora.recipe import Recipe
from multiflora.suggest import listed, shown
from multiflora.tensor_file import TensorFile
from multiflora.training.adapter import adapter_config, takes_start_off

__all__ = ["Earlier", "check_earlier", "start_from"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# what a training may have otherwise than the one before: its regularisation, and how fresh weights would begin
_FREE = _words(
    "lora_dropout head_dropout router_balance_loss router_z_loss balance_weight balance_delta knowledge_tasks "
    "router_entropy_loss orthogonality_loss stem_init "
    "align_weight init_weights init_seed gamma gradient_batches router_init init_lora_weights init_ia3_weights "
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs loftq_config eva_config "
    "corda_config lora_ga_config runtime_config frozen"
)
# notes on the file, and what names modules and tasks in one of several ways: the tensors tell these
_TOLD_OTHERWISE = _words(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules feedforward_modules layers_to_transform layers_pattern modules_to_save num_tasks task_names "
    "token_dim num_transformer_submodules num_attention_heads num_layers"
)


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The adapter that a training starts from."""

    folder: Path
    config: Any
    """Its ``peft.PeftConfig``."""
    sha256: str
    """Of its tensors' file."""
    fresh_tasks: tuple[str, ...] = ()
    """Tasks that it has no tensors for, whose own start as in a new adapter; empty for methods without such tensors."""
    other_base: str = ""
    """Name of the base model that it was trained on, where that is another one."""

    def words(self) -> str:
        """What is gone on from, and what a user may not have thought of, a sentence."""
        fresh = f"; it does not know {', '.join(self.fresh_tasks)}, which start fresh" if self.fresh_tasks else ""
        base = f"; it was trained on another base model, {self.other_base}" if self.other_base else ""
        return f"The training goes on from the adapter in {self.folder}{fresh}{base}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without the folders of this machine."""
        tasks = getattr(self.config, "task_names", None)
        found = {"folder": self.folder.name, "sha256": self.sha256, "fresh_tasks": list(self.fresh_tasks)}
        return found | ({"tasks": list(tasks)} if tasks else {})


def check_earlier(model: Any, recipe: Recipe) -> Earlier | None:
    """Look at the adapter that a recipe starts from, before anything is trained; None where it starts anew.

    Args:
        model: The recipe's model with its fresh adapter, see `multiflora.training.adapter.add_adapter`; shapes suffice.
        recipe: Its ``init_from`` and ``method`` are read.
    Raises:
        ConfigError: There is no sound adapter, or it is of another method, or of another shape; names the setting.
    """
    if recipe.init_from is None:
        return None
    folder = recipe.init_from
    _check_method(recipe)
    try:
        config = check_adapter(folder)
    except AdapterError as error:
        raise ConfigError(f"init_from: {error}") from error
    planned = model.active_peft_config
    _check_settings(folder, config, planned)
    _check_tensors(folder, config, model)
    known = config.task_names or () if _task_parts(planned) else _task_names(planned)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    fresh = tuple(name for name in _task_names(planned) if name not in known)
    base = "" if _is_base(recipe, config, planned) else str(config.base_model_name_or_path)
    return Earlier(folder=folder, config=config, sha256=digest, fresh_tasks=fresh, other_base=base)


def start_from(model: Any, recipe: Recipe) -> Earlier | None:
    """Give a fresh adapter the tensors of the one that a recipe starts from; None where it starts anew.

    What belongs to a task goes to the task of that name, whatever the order; a task that the earlier adapter does not
    know keeps the start it has, and one that is no longer trained on is left behind.

    Args:
        model: The recipe's model with its fresh adapter, changed in place.
        recipe: See `check_earlier`.
    Raises:
        ConfigError: See `check_earlier`.
    Example:
        >>> start_from(add_adapter(base, recipe), recipe).fresh_tasks  # doctest: +SKIP
        ('tulips',)
    """
    earlier = check_earlier(model, recipe)
    if earlier is None:
        return None
    tensors = load_file(earlier.folder / WEIGHTS)
    wanted = _tensors(model)
    planned = model.active_peft_config
    for name, tensor in wanted.items():
        if _part(name) in _task_parts(planned):
            axis = _task_axis(planned, name, tensor)
            had, fresh = tensors[name].movedim(axis, 0), tensor.movedim(axis, 0)
            ordered = _by_name(had, earlier.config.task_names, fresh, planned.task_names)
            tensors[name] = ordered.movedim(0, axis).contiguous()
    set_peft_model_state_dict(model, {name: tensors[name] for name in wanted})
    for name, tensor in _tensors(model).items():
        if not tensor.cpu().equal(tensors[name].to(tensor.dtype)):
            raise ConfigError(
                f"init_from: {name} of the adapter in {earlier.folder} could not be taken over by this method. Leave "
                "init_from out, and please report the recipe's method settings."
            )
    return earlier


def _check_method(recipe: Recipe) -> None:
    """Refuse methods that have no adapter to go on from."""
    name = recipe.method.name
    config, baseline = adapter_config(recipe), BASELINES.get(name)
    if baseline is not None and baseline.cannot_go_on:
        why = baseline.cannot_go_on
    elif getattr(config, "prefix_projection", False):
        why = BASELINES["ptuning"].cannot_go_on
    elif takes_start_off(config):
        why = (
            "takes its start off the base weights, and an earlier adapter has one already. What such a run saves is a "
            f"plain LoRA of twice its rank: go on with method lora, and r and lora_alpha as its {CONFIG} has them"
        )
    else:
        return
    raise ConfigError(f"init_from is {recipe.init_from}, but method is {name}, which {why}.")


def _check_settings(folder: Path, config: Any, planned: Any) -> None:
    """Refuse an adapter of another method, or with another setting that changes what it computes."""
    if type(config) is not type(planned):
        there, here = _name(config), _name(planned)
        raise ConfigError(
            f"init_from is {folder}, which holds an adapter of {there}, but method is {here}; a training goes on with "
            f"the method it began with. Set method to {there}, or leave init_from out."
        )
    had, has = (vars(each) for each in (config, planned))
    ours = [field.name for field in fields(planned)]
    told = [key for key in ours if key not in _FREE | _TOLD_OTHERWISE and _plain(had.get(key)) != _plain(has[key])]
    if told:
        words = ", ".join(f"{key} = {shown(had.get(key))} (here {shown(has[key])})" for key in told)
        raise ConfigError(
            f"init_from is {folder}, whose adapter has {words}; an adapter goes on in the shape it has. Give "
            f"{listed([f'method.{key}' for key in told], 10)} that value, or leave init_from out."
        )


def _check_tensors(folder: Path, config: Any, model: Any) -> None:
    """Refuse an adapter that is on other modules, or on another base model, or that does not name its tasks."""
    wanted, by_task = _tensors(model), _task_parts(config)
    if by_task and not config.task_names:
        raise ConfigError(
            f"init_from is {folder}, whose adapter has tensors for each task but does not name its tasks, so they "
            f"cannot be told apart. Write their names as task_names into {folder / CONFIG}, or leave init_from out."
        )
    with TensorFile(folder / WEIGHTS) as file:
        missing, strange = sorted(wanted.keys() - set(file.names)), sorted(set(file.names) - wanted.keys())
        if missing or strange:
            raise ConfigError(
                f"init_from is {folder}, whose adapter is on other modules: it lacks {len(missing)} of the "
                f"{len(wanted)} tensors here and has {len(strange)} others (first: {(missing + strange)[0]}). Give "
                f"method.target_modules (and modules_to_save) as {folder / CONFIG} has them, or leave init_from out."
            )
        for name, tensor in wanted.items():
            had, has = list(file.shape(name)), list(tensor.shape)
            if _part(name) in by_task and len(had) == len(has):  # of which there are as many as tasks
                axis = _task_axis(config, name, tensor)
                had[axis] = has[axis]
            if had != has:
                raise ConfigError(
                    f"init_from is {folder}, whose tensor {name} has shape {file.shape(name)}; expected "
                    f"{tuple(tensor.shape)}. It was trained on another base model "
                    f"({config.base_model_name_or_path}); set model to that one, or leave init_from out."
                )


def _is_base(recipe: Recipe, config: Any, planned: Any) -> bool:
    """Whether an adapter was trained on the recipe's model, by the names alone: folders move as a whole."""
    name = Path(str(config.base_model_name_or_path)).name
    here = HUB_NAME if recipe.model.name == "embedded" else recipe.model.name
    return name in (Path(here).name, Path(str(planned.base_model_name_or_path)).name)


def _tensors(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors under the names they are saved by."""
    if model.active_peft_config.is_prompt_learning:  # which peft would compute, on shapes without values, too
        return {"prompt_embeddings": model.prompt_encoder[model.active_adapter].embedding.weight.detach()}
    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def _task_parts(config: Any) -> set[str]:
    """Names of the tensors that hold a row for each task: those whose shape grows with the number of tasks."""
    method = method_of(config)
    if method is None:
        return set()
    two, three = (replace(config, num_tasks=number, task_names=None).at_most() for number in (2, 3))
    grown = method.shapes(three, config.r, 1, 1)
    return {part for part, shape in method.shapes(two, config.r, 1, 1).items() if grown[part] != shape}


def _task_axis(config: Any, name: str, tensor: Tensor) -> int:
    """Which axis of a tensor has a row for each task: the first, or the one behind that of a mixture's experts."""
    method = method_of(config)
    return 0 if method is None else tensor.dim() - len(method.shapes(config.at_most(), config.r, 1, 1)[_part(name)])


def _part(name: str) -> str:
    """A tensor's own name within its layer: ``task_matrix`` of ``...q_proj.mf_mtllora_task_matrix``."""
    last = name.rpartition(".")[2]
    return last.partition("_")[2].partition("_")[2] if last.startswith(STEM) else last


def _by_name(had: Tensor, names: Sequence[str], fresh: Tensor, wanted: Sequence[str]) -> Tensor:
    """Rows of tasks, (tasks, ...), in another order of tasks; a task that had none keeps its fresh one."""
    rows = [had[names.index(name)] if name in names else fresh[i].cpu() for i, name in enumerate(wanted)]
    return torch.stack([row.to(had.dtype) for row in rows])


def _task_names(config: Any) -> tuple[str, ...]:
    """The tasks that a method of ours was told of."""
    return tuple(getattr(config, "task_names", None) or ())


def _name(config: Any) -> str:
    """The first of our words for a config's kind."""
    kind = type(config).__name__
    return next((name for name, card in METHODS.items() if card.config == kind), kind)


def _plain(value: Any) -> Any:
    """A setting as it compares: a file has lists where a config has sets, and null for nothing."""
    return sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value or None
