"""An engine that is missing, or that takes from a method what it looks at, is refused in words."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.training.engines import require_engine
from tests.integration.toys import make_recipe

ENGINES = {
    "ddp": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what a launcher sets for an engine; DeepSpeed is there or is not."""

    def launch(engine: str, *, installed: bool = True) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        for name, value in ENGINES[engine].items():
            monkeypatch.setenv(name, value)
        find_spec = importlib.util.find_spec
        found = ModuleSpec("deepspeed", None) if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "deepspeed" else find_spec(name))

    return launch


@pytest.mark.parametrize(
    ("method", "refusing"),
    [
        ("rlora", []),
        ("lora", []),
        ("adalora", ["fsdp", "zero2", "zero3"]),
        ("loraga", ["fsdp", "zero2", "zero3"]),
        ("prefix", ["fsdp", "zero3"]),
        ("deltalora", []),
        ({"name": "deltalora", "start_step": 2}, ["fsdp", "zero3"]),
    ],
)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_method_that_finds_its_tensors_divided_is_refused(
    launched: Any, tmp_path: Path, method: Any, refusing: list[str], engine: str
) -> None:
    recipe = make_recipe(tmp_path, method)
    launched(engine)
    if engine in refusing:
        named = "FSDP" if engine == "fsdp" else "DeepSpeed"
        with pytest.raises(
            ConfigError, match=rf"{recipe.method.name}, which .*; {named} does .* Launch this run with DDP"
        ):
            require_engine(recipe)
    else:
        require_engine(recipe)


def test_deepspeed_has_to_be_installed_only_where_it_is_asked_for(launched: Any, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "rlora")
    launched("fsdp", installed=False)
    require_engine(recipe)
    launched("zero2", installed=False)
    with pytest.raises(EnvironmentProblem, match=r"not installed: pip install 'multiflora\[deepspeed\]'"):
        require_engine(recipe)
