"""One base model and any number of adapters of any method on it, with one copy of the base weights in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiflora.adapter_folder import check_there, load_adapter
from multiflora.adapter_tensors import method_of
from multiflora.base_model import share_weights
from multiflora.context import configs_of
from multiflora.errors import AdapterError, ConfigError
from multiflora.files import user_path

__all__ = ["Served", "load_served", "name_adapters"]


@dataclass(frozen=True)
class Served:
    """A model under a name."""

    name: str
    model: Any
    tasks: tuple[str, ...] = ()
    """Tasks its adapter knows, by name or, where they have none, by number."""
    needs_task: bool = False
    """Whether no answer can be given without one."""

    def task_of(self, asked: str | int | None) -> str | int | None:
        """The task to run a request under, or None where the model knows no tasks.

        Raises:
            AdapterError: It is missing, or none of this model's.
        """
        known = f"its tasks are {', '.join(self.tasks)}" if self.tasks else "it has no tasks"
        if asked is None:
            if self.needs_task and len(self.tasks) > 1:
                raise AdapterError(
                    f"Model {self.name} needs to know the task; {known}. Send the header X-Multiflora-Task or the "
                    "field task."
                )
            return None
        if str(asked) not in self.tasks:
            raise AdapterError(f"Model {self.name} has no task {asked!r}; {known}.")
        return self.tasks.index(str(asked))


def name_adapters(words: list[str]) -> dict[str, Path]:
    """Read ``NAME=FOLDER`` or ``FOLDER`` (named after itself), and refuse what would be ambiguous.

    Raises:
        ConfigError: A name comes twice, or a folder holds no adapter.

    Example:
        >>> name_adapters([])
        {}
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        folder = user_path(place if equals else word)
        name = name if equals else folder.resolve().name
        check_there(folder, ConfigError)
        if not name or name in found:
            raise ConfigError(f"Two adapters are called {name!r}; name them apart: NAME={folder}.")
        found[name] = folder
    return found


def load_served(base: Any, name: str, adapters: Mapping[str, Path]) -> dict[str, Served]:
    """Put each adapter on a tree of its own over the base's weights.

    Args:
        base: The base model; it is served, too.
        name: The name it is served under.
        adapters: Folders by name.

    Raises:
        ConfigError: An adapter has the base's name.
        AdapterError: An adapter does not fit the base model.
    """
    if name in adapters:
        raise ConfigError(f"The base model and an adapter are both called {name!r}; rename the adapter: OTHER=FOLDER.")
    served = {name: Served(name, base)}
    for adapter, folder in adapters.items():
        tree = share_weights(base)
        model = load_adapter(tree, folder).eval()
        served[adapter] = Served(adapter, model, *_tasks(model))
    return served


def _tasks(model: Any) -> tuple[tuple[str, ...], bool]:
    """Names of the tasks an adapter knows, and whether it needs one."""
    config = next(iter(configs_of(model).values()), None)
    if config is None or not config.num_tasks:
        return (), False
    method = method_of(config)
    names = config.task_names or [str(number) for number in range(config.num_tasks)]
    return tuple(names), method is not None and method.needs_task()
