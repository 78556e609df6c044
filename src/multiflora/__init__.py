"""Multiflora: one language model, many tasks, multi-branch LoRA.

``import multiflora`` is all a PEFT script needs: from then on peft knows every method here, whichever is imported
first. The import itself is cheap (no torch); names are loaded when they are used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import wrapt

from multiflora._version import __version__
from multiflora.errors import (
    AdapterError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    ExportError,
    MultifloraError,
)

if TYPE_CHECKING:
    from multiflora.comparison.analyze import analyze
    from multiflora.comparison.run import compare
    from multiflora.compress.saved import load_compressed
    from multiflora.context import auxiliary_loss, task
    from multiflora.evaluation.run import evaluate
    from multiflora.export import to_lora
    from multiflora.jobs.train import train
    from multiflora.methods.alignlora import AlignLoraConfig
    from multiflora.methods.deltalora import DeltaLoraConfig
    from multiflora.methods.gradient_pass import start_from_gradients
    from multiflora.methods.hydralora import HydraLoraConfig, suggest_num_heads
    from multiflora.methods.loraga import LoraGaConfig
    from multiflora.methods.loramoe import LoraMoeConfig
    from multiflora.methods.mixlora import MixLoraConfig
    from multiflora.methods.mlora import MLoraConfig
    from multiflora.methods.moelora import MoeLoraConfig
    from multiflora.methods.mtllora import MtlLoraConfig
    from multiflora.methods.multilora import MultiLoraConfig
    from multiflora.methods.parts import PartsConfig
    from multiflora.methods.rlora import RLoraConfig
    from multiflora.reports.run import report
    from multiflora.training.hooks import training_callbacks

# name -> the module that defines it; as the methods' configs, loaded on first use: `multiflora --help` needs no torch
_LAZY = {
    "suggest_num_heads": "multiflora.methods.hydralora",
    "task": "multiflora.context",
    "start_from_gradients": "multiflora.methods.gradient_pass",
    "training_callbacks": "multiflora.training.hooks",
    "auxiliary_loss": "multiflora.context",
    "train": "multiflora.jobs.train",
    "evaluate": "multiflora.evaluation.run",
    "compare": "multiflora.comparison.run",
    "analyze": "multiflora.comparison.analyze",
    "report": "multiflora.reports.run",
    "to_lora": "multiflora.export",
    "load_compressed": "multiflora.compress.saved",
}

__all__ = [
    "AdapterError",
    "AlignLoraConfig",
    "ConfigError",
    "DataError",
    "DeltaLoraConfig",
    "EnvironmentProblem",
    "ExportError",
    "HydraLoraConfig",
    "LoraGaConfig",
    "LoraMoeConfig",
    "MLoraConfig",
    "MixLoraConfig",
    "MoeLoraConfig",
    "MtlLoraConfig",
    "MultiLoraConfig",
    "MultifloraError",
    "PartsConfig",
    "RLoraConfig",
    "__version__",
    "analyze",
    "auxiliary_loss",
    "compare",
    "evaluate",
    "load_compressed",
    "report",
    "start_from_gradients",
    "suggest_num_heads",
    "task",
    "to_lora",
    "train",
    "training_callbacks",
]


def __getattr__(name: str) -> Any:
    home = _LAZY.get(name) or (_home_of(name) if name.endswith("Config") else None)
    if home is not None:
        # first, and not from within our modules: peft's arrival loads all of them, and one that waits for peft is not
        # whole yet
        import_module("peft")
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'multiflora' has no attribute {name!r}; it has {', '.join(__all__)}.")


def _home_of(config: str) -> str | None:
    """The module of a method's config class."""
    from multiflora.methods.cards import METHODS

    return next((card.module for card in METHODS.values() if card.module and card.config == config), None)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register(arrived: Any) -> None:
    """Teach peft our methods as soon as it is imported, now or later.

    peft may come in the middle of one of our modules, which imports it: then all of these have to be whole first.
    """
    half_made = {name for name in _NEEDED if _is_half_made(name)} - {arrived.__name__}
    if "peft" in sys.modules and not half_made and (arrived.__name__ == "peft" or not _is_half_made("peft")):
        import_module("multiflora.methods.registration").register_methods()


def _is_half_made(name: str) -> bool:
    """Whether a module's own import is still under way; importlib tells by the same mark."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


# what registration imports; any of them may be a script's first import
_NEEDED = ["multiflora.peft_bridge"] + [
    f"multiflora.methods.{module.name}" for module in iter_modules([str(Path(__file__).with_name("methods"))])
]

for _name in ["peft", *_NEEDED]:
    wrapt.register_post_import_hook(_register, _name)
