"""The command line in a temporary folder, and the smallest real parts it can run on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from multiflora.cli import main

from .parts import COMMAND, Command, Ended, save_model, write_task


@pytest.fixture
def multiflora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in ``tmp_path``, in this process: a process of its own imports torch anew, which takes seconds.

    A bug is no ``SystemExit`` and so fails the test with its traceback.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["multiflora", *words])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
        return Ended(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def installed(tmp_path: Path) -> Command:
    """Run the installed command in ``tmp_path``, without a network and with plain output.

    For what only a process of its own shows: what it prints besides, limits of the system, its exit code.
    """

    def run(*words: str, **options: object) -> Ended:
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }
        done = subprocess.run(
            [COMMAND, *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
            **options,  # type: ignore[call-overload]
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, saved as a hub model would be."""
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path) -> Path:
    """A recipe over two small tasks that trains in seconds."""
    for name in ("roses", "tulips"):
        write_task(tmp_path, name)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
model: {model_folder}
method: {{name: rlora, r: 2, num_heads: 2}}
tasks: [roses.jsonl, tulips.jsonl]
train: {{max_steps: 2, batch_size: 4, max_length: 128, log_every: 1}}
evaluate: {{limit: 2, batch_size: 2}}
output: run
""",
        "utf-8",
    )
    return path
