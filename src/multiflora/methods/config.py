"""The words every method shares. They are peft's words with peft's meaning; a method adds only its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Optional, Union

from peft import PeftConfig

from multiflora.errors import ConfigError
from multiflora.methods.per_layer import at_layer, at_most_heads, head_counts
from multiflora.methods.settings import setting_problems


@dataclass
class AdapterConfig(PeftConfig):
    """Settings common to all multi-branch methods.

    A config is a plain ``peft.PeftConfig``: hand it to ``get_peft_model``, ``SFTTrainer(peft_config=...)`` or
    ``model.add_adapter``; ``PeftModel.from_pretrained`` restores it.

    Raises:
        ConfigError: A value is out of range; the message names field, value and range. Nothing has been changed.
    """

    # The name of the method this config belongs to; set by each method's class.
    method_name: ClassVar[str] = ""
    # The setting that says how many heads a layer has, one for all or a list with one for each block.
    heads_setting: ClassVar[str] = ""

    r: int = field(default=8, metadata={"help": "Rank of each branch."})
    lora_alpha: float = field(default=16, metadata={"help": "alpha; the update is scaled by alpha/r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha/sqrt(r) instead of alpha/r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the stems, in [0, 1)."})
    # Optional/Union instead of `|`: peft and transformers read these annotations at run time on Python 3.10
    target_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={"help": "Names (or one regular expression) of the modules to adapt, or 'all-linear'."},
    )
    exclude_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "Names (or one regular expression) of modules to leave out."}
    )
    modules_to_save: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Other modules to train in full and save, such as a new classifier."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'lora_only'."})
    layers_to_transform: Optional[Union[list[int], int]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "Indices of the layers to adapt; all when not given."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={"help": "Name of the layer list, where it is not a usual one such as 'layers' or 'h'."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank of single modules, by name or regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alpha of single modules, by name or regular expression."}
    )
    heads_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Number of heads (experts, modules) of single modules, by name or regular expression."},
    )
    init_weights: Union[bool, str] = field(  # noqa: UP007
        default=True,
        metadata={"help": "The method's own start (True), or everything random (False, for tests)."},
    )
    init_seed: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "Seed of the start of all weights; torch's global generator when not given."},
    )
    num_tasks: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "How many tasks there are; needed by methods gated by task."}
    )
    task_names: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Names of the tasks, in the order of their ids."}
    )
    # peft and trl read these three on any config
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "Token ids whose embeddings are trained too."}
    )
    target_parameters: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Fused experts to adapt, too: names, or how they end."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Not supported: leave it False."})
    layer_replication: Optional[list[list[int]]] = field(  # noqa: UP045
        default=None, metadata={"help": "Not supported: the base model is never changed."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        from multiflora.peft_bridge import peft_type

        wrong = list(setting_problems(type(self), vars(self)))
        if wrong:  # before anything here looks into a value
            raise ConfigError(f"{type(self).__name__}: " + " ".join(wrong))
        self.peft_type = peft_type(self.method_name)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # peft's own convention
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.task_names is not None:
            self.task_names = list(self.task_names)
            if self.num_tasks is None:
                self.num_tasks = len(self.task_names)
        problems = list(self.problems())
        if problems:
            raise ConfigError(f"{type(self).__name__}: " + " ".join(problems))

    def __setattr__(self, name: str, value: Any) -> None:
        # what layers have made of the settings holds as long as this number does
        super().__setattr__(name, value)
        self.__dict__["_changes"] = self.__dict__.get("_changes", 0) + 1

    @property
    def changes(self) -> int:
        """How often a setting was set."""
        number: int = self.__dict__["_changes"]
        return number

    def head_counts(self) -> list[int]:
        """Every number of heads that a layer may have."""
        return head_counts(self)

    def at(self, layer: str) -> Any:
        """The config as the layer of that name reads it, with its own number of heads.

        Raises:
            ConfigError: It says nothing of that layer.
        """
        return at_layer(self, layer)

    def at_most(self) -> Any:
        """The config as the layer with the most heads reads it."""
        return at_most_heads(self)

    def with_heads(self, heads: int) -> dict[str, Any]:
        """The settings that a layer with that many heads reads in place of the adapter's."""
        return {self.heads_setting: heads}

    def problems(self) -> list[str]:
        """What cannot work in these settings, a sentence each; a method adds its own.

        Types and ranges have been looked at before, by the settings' names: see `multiflora.methods.settings`.
        """
        found: list[str] = []
        if self.task_names is not None:
            if len(set(self.task_names)) < len(self.task_names):
                found.append(f"task_names has a name twice: {self.task_names}; each task needs its own.")
            if self.num_tasks != len(self.task_names):
                found.append(
                    f"num_tasks is {self.num_tasks} but task_names has {len(self.task_names)} names; make them agree."
                )
        for name in ("rank_pattern", "alpha_pattern", "heads_pattern"):
            for key in getattr(self, name) or {}:
                try:
                    re.compile(key)
                except re.error as error:
                    found.append(f"{name} key {key!r} is not a regular expression ({error}).")
        heads = getattr(self, self.heads_setting, 1)
        if self.heads_pattern and not self.heads_setting:
            found.append(f"heads_pattern is given, and a layer of {self.method_name} has one head: leave it out.")
        if not isinstance(heads, int) and not heads:
            found.append(f"{self.heads_setting} is an empty list; give a number for each block, or one for all.")
        if self.target_parameters and self.layers_to_transform is not None:
            found.append(
                "layers_to_transform does not go with target_parameters: name the layers in these, as in "
                "'layers.0.mlp.experts.down_proj'."
            )
        if self.layer_replication:
            found.append(
                f"layer_replication is {self.layer_replication}; it makes another base model, which is never changed "
                "here: replicate the layers yourself, and adapt that model."
            )
        if self.ensure_weight_tying:
            found.append("ensure_weight_tying is True; tied copies of an adapter are not supported: leave it False.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    found.append(f"{name} cannot be used with a regular expression in target_modules: list the names.")
        chosen = bool(self.layers_to_transform) or self.layers_to_transform == 0
        if self.layers_pattern and not chosen and isinstance(heads, int):
            found.append("layers_pattern is given without layers_to_transform: say which layers, too.")
        return found


def one_of(config: Any, name: str, allowed: tuple[Any, ...]) -> list[str]:
    """A sentence if the field is none of ``allowed``."""
    value = getattr(config, name)
    if value in allowed:
        return []
    return [f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}."]


def own_settings(config_class: type[AdapterConfig]) -> tuple[str, ...]:
    """The settings a method adds to the shared ones, in order."""
    shared = {item.name for item in fields(AdapterConfig)}
    return tuple(item.name for item in fields(config_class) if item.name not in shared)
