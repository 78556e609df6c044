"""An adapter of ours on axolotl's model: a new one, or one that was trained before."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from peft import PeftModel

from multiflora.context import task
from multiflora.errors import ConfigError
from multiflora.integrations.axolotl.section import Section
from multiflora.training.adapter import put_on

__all__ = ["adapted"]

_UNTIL_THE_END = ExitStack()
"""What holds until the program ends: axolotl says nowhere when it is done with a model."""


def adapted(model: Any, config: Any, section: Section, folder: str | None, *, is_trainable: bool) -> Any:
    """Return the model with its adapter.

    Args:
        model: The base model.
        config: What a new adapter is made from.
        section: Whose task all rows belong to that come without one.
        folder: Of a trained adapter; None: a new one.
        is_trainable: Whether a trained adapter shall learn on.

    Raises:
        ConfigError: The trained adapter is of another method.
        AdapterError: It is damaged, or has no such task.
    """
    if folder is None:
        model = put_on(model, config)
    else:
        model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
        found = model.active_peft_config
        if type(found) is not type(config):
            raise ConfigError(
                f"lora_model_dir is {folder}, which holds a {getattr(found, 'method_name', found.peft_type)} adapter, "
                f"but multiflora.method is {section.method.name}. Name the method that was trained."
            )
    model.print_trainable_parameters()
    if section.task is not None:
        _UNTIL_THE_END.enter_context(task(model, section.task))
    return model
