"""Axolotl trains our methods: ``adapter: multiflora`` and a section ``multiflora:`` in its config.

Axolotl finds the plug-in by the entry point ``axolotl.plugins`` and loads it with every command, so this file imports
no torch of its own; what a training needs is imported by the hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel

from multiflora.integrations.axolotl.section import adapter_config, check, prepare, section_of

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.utils.dict import DictDefault
    from transformers import Trainer, TrainerCallback

__all__ = ["MultifloraArgs", "MultifloraPlugin"]


class MultifloraArgs(BaseModel):
    """What axolotl's config takes besides."""

    multiflora: dict[str, Any] | None = None
    """See `multiflora.integrations.axolotl.section.Section`."""


class MultifloraPlugin(BasePlugin):
    """Puts our adapters on axolotl's model, and tells them the task of each token.

    What methods add to the loss needs nothing here: it is in the loss that the model returns, which axolotl takes.
    """

    def register(self, cfg: DictDefault) -> None:
        """Refuse a config that cannot work, before axolotl loads anything."""
        if check(cfg):
            prepare(cfg)

    def get_input_args(self) -> str:
        """Name the class that has our key."""
        return f"{__name__}.MultifloraArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name our adapter."""
        return [AdapterCapabilities(name="multiflora")]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Load the rows as axolotl does; each keeps the name of its task."""
        if section_of(cfg) is None:
            return None
        from multiflora.integrations.axolotl.rows import load_with_tasks

        return load_with_tasks(cfg)

    def load_adapter(
        self, model: Any, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Put the adapter of the section on the model, or load that of ``lora_model_dir``."""
        section = section_of(cfg)
        if section is None:
            return None
        config = adapter_config(section, cfg)
        if config_only:
            return None, config
        from multiflora.integrations.axolotl.adapter import adapted

        return adapted(model, config, section, cfg.lora_model_dir, is_trainable=not inference), config

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        """Axolotl's trainer, with the tasks in its batches and its log."""
        if section_of(cfg) is None:
            return None
        from multiflora.integrations.axolotl.trainer import MultitaskAxolotlTrainer

        trainer: type[Trainer] = MultitaskAxolotlTrainer
        return trainer

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """What LoRA-GA and Delta-LoRA need besides steps."""
        if section_of(cfg) is None:
            return []
        from multiflora.training.hooks import training_callbacks

        return training_callbacks(trainer.model)
