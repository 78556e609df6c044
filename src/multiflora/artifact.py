"""The artefact: what lies beside the adapter, so that a run explains itself.

``recipe.yaml`` is the resolved recipe, ``results.json`` the scores and the mixture (the same recipe and seed give the
same bytes on one machine), ``run.json`` what differs from run to run (versions, command, seconds, fingerprints of the
data), and ``README.md`` the model card. Each is whole or not there, and no secret enters any of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiflora.card import model_card
from multiflora.embedded import HUB_NAME
from multiflora.files import saving, write_json, write_text
from multiflora.redact import without_home, without_secrets

if TYPE_CHECKING:
    from multiflora.evaluation.results import Results
    from multiflora.recipe import Recipe

__all__ = ["PACKAGES", "current_command", "device_name", "fingerprint", "package_versions", "write_artifact"]

PACKAGES = (
    "multiflora",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "lm_eval",
    "reasoning-gym",
    "numpy",
)
"""Packages whose versions can change a result."""


def write_artifact(
    folder: Path,
    recipe: Recipe,
    *,
    adapted: Results,
    base: Results | None = None,
    mixture: Mapping[str, Mapping[str, Any]] | None = None,
    parameters: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> dict[str, Any]:
    """Write the run's four texts beside its adapter.

    Args:
        folder: The run's output folder.
        recipe: The resolved recipe.
        adapted: Scores with the adapter.
        base: Scores of the base model.
        mixture: Task -> what was trained on, see `multiflora.data.mixture.Mixture.report`.
        parameters: Counts, e.g. ``{"trainable": 1000, "total": 100000}``.
        training: Figures that the seed determines, e.g. steps and losses; they go into ``results.json``.
        fingerprints: Name of the data -> their `fingerprint`.
        seconds: Stage -> how long it took.
        notes: Sentences for the card, e.g. how many examples were too long.
        command: The command as the user gave it; None: this process's.

    Returns:
        What ``results.json`` holds.

    Raises:
        EnvironmentProblem: No space, or no permission; files that were there before are unchanged.
    """
    from multiflora.training.precision import weights_of

    results = {
        "seed": recipe.seed,
        "method": recipe.method.name,
        "base": base,
        "adapted": adapted,
        "mixture": dict(mixture or {}),
        "parameters": dict(parameters or {}),
        "training": dict(training or {}),
    }
    run = {
        "command": current_command() if command is None else command,
        "versions": package_versions(),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "device": device_name(),
            "weights": str(weights_of(recipe)).removeprefix("torch."),
        },
        "seconds": {stage: round(value, 2) for stage, value in (seconds or {}).items()},
        "fingerprints": dict(fingerprints or {}),
        "notes": list(notes),
    }
    run = json.loads(without_home(without_secrets(json.dumps(run))))
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _name_base(folder, recipe)
    write_text(folder / "recipe.yaml", without_secrets(recipe.to_yaml(folder)))
    write_json(folder / "results.json", json.loads(without_secrets(json.dumps(results))))
    write_json(folder / "run.json", run)
    write_text(folder / "README.md", without_secrets(model_card(recipe, results, run)))
    return results


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of rows and a SHA-256 over them, in order, whatever file or hub they came from.

    Example:
        >>> fingerprint([{"prompt": "a", "completion": " b"}])["rows"]
        1
    """
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def current_command() -> str:
    """Return the command of this process as one would type it again.

    Example:
        >>> isinstance(current_command(), str)
        True
    """
    program, *words = sys.argv or [""]
    path = Path(program)
    if path.stem == "multiflora" or path.parent.name == "multiflora":
        return shlex.join(["multiflora", *words])
    if not program or program in {"-c", "-m"}:
        return "python (in a session; see recipe.yaml)"
    return shlex.join(["python", program, *words])


def device_name() -> str:
    """Name what the run computed on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _name_base(folder: Path, recipe: Recipe) -> None:
    """Let the adapter name the embedded model by its public name, not by a folder in the user's cache."""
    path = folder / "adapter_config.json"
    if recipe.model.name != "embedded" or not path.is_file():
        return
    config = json.loads(path.read_text("utf-8"))
    write_json(path, {**config, "base_model_name_or_path": HUB_NAME})
