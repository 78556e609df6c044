"""The shipped tasks: one YAML file each in ``catalog/``, read without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiflora.schema import Strict, build
from multiflora.tasks.spec import TaskSpec
from multiflora.yaml_file import parse_yaml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11 on; 3.10 has it in importlib.abc

__all__ = ["ShippedTask", "shipped_tasks"]


class ShippedTask(Strict):
    """A task file of the catalog: the task, where its description comes from, and rows to check it on."""

    spec: TaskSpec
    """The task."""
    origin: str
    """What the data set is, which splits are used and why."""
    sample_rows: tuple[dict[str, Any], ...]
    """Made-up rows in the data set's own schema; the tests render them."""


class _Catalog(Mapping[str, ShippedTask]):
    """Name -> task in the order of names; a file is read when its task is asked for."""

    def __init__(self, folder: Traversable) -> None:
        found = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
        self._files = {name: found[name] for name in sorted(found)}
        self._read: dict[str, ShippedTask] = {}

    def __getitem__(self, name: str) -> ShippedTask:
        if name not in self._read:
            self._read[name] = _read(name, self._files[name].read_text(encoding="utf-8"))
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@cache
def shipped_tasks() -> Mapping[str, ShippedTask]:
    """Return the catalog: name -> task, in the order of names; a task is read when it is asked for.

    Example:
        >>> "gsm8k" in shipped_tasks(), shipped_tasks()["gsm8k"].spec.score
        (True, 'number')
    """
    return _Catalog(files("multiflora.tasks") / "catalog")


def _read(name: str, text: str) -> ShippedTask:
    value = dict(parse_yaml(text, f"catalog/{name}.yaml"))
    extras = {key: value.pop(key) for key in ("origin", "sample_rows") if key in value}
    return build(
        ShippedTask,
        {"spec": {"name": name, **value}, **extras},
        where=f"catalog/{name}.yaml",
        base=Path.cwd(),
    )
