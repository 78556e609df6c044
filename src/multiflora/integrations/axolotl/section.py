"""The section ``multiflora:`` of axolotl's config: read as strictly as a recipe, and what it means for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from multiflora.errors import ConfigError
from multiflora.methods import METHODS, build_config, merges
from multiflora.recipe import MethodSpec
from multiflora.schema import Strict, as_mapping, build

__all__ = ["Section", "adapter_config", "check", "prepare", "section_of", "task_names", "task_of"]

_WHERE = "axolotl's config"

_NOT_SHOWN = (
    "rl",
    "reward_model",
    "process_reward_model",
    "streaming",
    "pretraining_dataset",
    "load_in_4bit",
    "load_in_8bit",
    "trainer_cls",
)
"""Settings that lead past what this plug-in does, or that axolotl heeds for its own adapters alone."""

_OF_LORA = ("lora_", "loraplus_", "peft")

_HEEDED = ("lora_model_dir", "lora_on_cpu")
"""Settings named after LoRA that hold for any adapter."""


class Section(Strict):
    """What stands under ``multiflora:``."""

    method: Annotated[MethodSpec, BeforeValidator(lambda value: as_mapping(value, "name"))]
    """The method, as in a recipe: its name, or a mapping with its name and its settings."""
    task: str | None = None
    """For ``inference`` and ``merge-lora`` of an adapter that is gated by task: which task is meant."""


def section_of(cfg: Any) -> Section | None:
    """The section of a config with ``adapter: multiflora``; None for any other config.

    Raises:
        ConfigError: It is missing or has problems: all of them are listed.
    """
    if cfg.get("adapter") != "multiflora":
        return None
    given = cfg.get("multiflora")
    if given is None:
        raise ConfigError(
            f"{_WHERE}: multiflora is missing; adapter: multiflora takes its method from there. "
            "Write e.g. multiflora: {method: {name: rlora, num_heads: 4, r: 8}}."
        )
    plain = given.to_dict() if hasattr(given, "to_dict") else given
    return build(Section, plain, where=f"{_WHERE}, under multiflora", base=Path.cwd())


def check(cfg: Any) -> bool:
    """Whether a config asks for our adapter; refuses what cannot work, before anything is loaded.

    Args:
        cfg: The config as the user wrote it, with what the command line set.

    Raises:
        ConfigError: Says which key, and what to do.
    """
    section = section_of(cfg)
    if section is None:
        if cfg.get("multiflora"):
            raise ConfigError(
                f"{_WHERE}: multiflora is given, but adapter is {cfg.get('adapter')!r}, which does not read it. Write "
                "adapter: multiflora, or remove the section."
            )
        return False
    name = section.method.name
    if METHODS[name].module is None:
        ours = ", ".join(name for name, card in METHODS.items() if card.module is not None)
        raise ConfigError(
            f"{_WHERE}: multiflora.method is {name}, which is no method of multiflora's own: those are {ours}. Axolotl "
            "has peft's methods itself (adapter: lora, peft_use_dora ...)."
        )
    for key in cfg:
        if key.startswith(_OF_LORA) and key not in _HEEDED and cfg[key]:
            raise ConfigError(
                f"{_WHERE}: {key} is given, and adapter: multiflora would not read it. The settings of the method are "
                "those under multiflora.method (r, lora_alpha, target_modules ...); remove this one."
            )
        if key in _NOT_SHOWN and cfg[key]:
            raise ConfigError(f"{_WHERE}: {key} does not go with adapter: multiflora. Remove one of the two.")
    if cfg.get("merge_method") not in (None, "legacy"):
        raise ConfigError(
            f"{_WHERE}: merge_method is {cfg['merge_method']!r}, which reads the files of a plain LoRA. Write legacy, "
            "which has the adapter merge itself, or leave it out."
        )
    if cfg.get("inference") and not cfg.get("lora_model_dir"):
        raise ConfigError(
            f"{_WHERE}: lora_model_dir is missing, so the answers would be those of an untrained adapter. Give the "
            "folder that was trained: --lora-model-dir FOLDER."
        )
    adapter_config(section, cfg)
    merged = merges(name, section.method.settings)
    if cfg.get("merge_lora") and merged.startswith("no"):
        raise ConfigError(
            f"{_WHERE}: multiflora.method is {name}, whose update is no single matrix: {merged.removeprefix('no ')}. "
            "Keep the adapter as it is, or approximate it by a plain LoRA: multiflora convert."
        )
    if merged == "per task" and section.task is None and (cfg.get("inference") or cfg.get("merge_lora")):
        raise ConfigError(
            f"{_WHERE}: multiflora.task is missing; {name} is another adapter for each task. Name the one that is "
            "meant: multiflora: {task: NAME, ...}."
        )
    return True


def prepare(cfg: Any) -> None:
    """Have axolotl merge by the adapter's own code, and not by its code for the files of plain LoRA."""
    cfg["merge_method"] = "legacy"


def adapter_config(section: Section, cfg: Any) -> Any:
    """The peft config of the section's method, which knows the names of the tasks.

    Raises:
        ConfigError: A setting is unknown or out of range, or the data sets have no names to tell them by.
    """
    # what is no mapping at all, axolotl refuses itself
    names = task_names(each for each in cfg.get("datasets") or () if isinstance(each, Mapping))
    known: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if names:
        known |= {"num_tasks": len(names), "task_names": names}
    config = build_config(section.method.name, known | section.method.settings)
    if cfg.get("sample_packing") and getattr(config, "balance_weight", None):
        raise ConfigError(
            f"{_WHERE}: sample_packing is true and multiflora.method.balance_weight is {config.balance_weight}; that "
            "loss balances the experts over rows of one example each. Set one of the two to false or 0."
        )
    return config


def task_of(dataset: Any) -> str:
    """The name of a data set's task: its ``name``, or else the last part of its ``path``, a file's without its ending.

    Example:
        >>> task_of({"path": "nyu-mll/glue", "name": "sst2"}), task_of({"path": "stanfordnlp/imdb"})
        ('sst2', 'imdb')
    """
    path = str(dataset.get("path") or "")
    last = path.rstrip("/").rpartition("/")[2]
    return str(dataset.get("name") or (Path(path).stem if Path(path).is_file() else last))


def task_names(datasets: Iterable[Any]) -> list[str]:
    """The tasks of a config's data sets, in order; data sets that are given one ``name`` are one task.

    Raises:
        ConfigError: Two are called alike by their paths.
    """
    seen: dict[str, tuple[int, Any]] = {}
    for i, dataset in enumerate(datasets):
        name = task_of(dataset)
        first, other = seen.setdefault(name, (i, dataset))
        if other is not dataset and not (dataset.get("name") and other.get("name")):
            raise ConfigError(
                f"{_WHERE}: datasets.{i} ({dataset.get('path')}) and datasets.{first} ({other.get('path')}) are both "
                f"called {name!r}. Give each a name; the same one, if they are one task."
            )
    return list(seen)
