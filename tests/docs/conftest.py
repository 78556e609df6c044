"""A hub cache that holds one tiny model under the name the documents use, so that their code runs as it stands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.parts import save_model, write_task

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
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


@pytest.fixture
def desk(tmp_path: Path, hub_cache: Path) -> Iterator[dict[str, str]]:
    """A folder with a reader's files, and the environment to run the reader's commands in."""
    write_task(tmp_path, "reviews")
    write_task(tmp_path, "questions")
    rows = "".join(f'{{"text": "{i} lamps are dark", "label": {i % 2}}}\n' for i in range(24))
    (tmp_path / "tickets.jsonl").write_text(rows, "utf-8")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield os.environ | {
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "80",
    }
    os.chdir(before)
