"""A hub cache that holds one tiny model under the name the documents use, so that their code runs as it stands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.parts import save_model
from pages import HUB_NAME, lay_out

COMMIT = "0" * 40


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a download would have left: huggingface_hub finds a model by the name of its folder here."""
    cache = tmp_path_factory.mktemp("hub")
    folder = cache / f"models--{HUB_NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, "utf-8")
    save_model(folder / "snapshots" / COMMIT)
    return cache


@pytest.fixture(scope="session")
def environment(hub_cache: Path) -> dict[str, str]:
    """What a reader's commands run in."""
    return os.environ | {
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "80",
    }


@pytest.fixture
def desk(tmp_path: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A folder with a reader's files, and the environment to run the reader's commands in."""
    lay_out(tmp_path)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield environment
    os.chdir(before)
