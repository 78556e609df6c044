"""Every path that a command takes, in forms that name nothing: a sentence and exit code 2, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_adapters import adapted, save
from typer.testing import CliRunner

from multiflora.cli import app
from multiflora.files import beside

ODD = {
    "nobody's home": "~nouser/x",
    "NUL": "a\0b",
    "long": "x" * 5000,
    "links in a circle": "circle",
    "half a character": "\udcff",
    "empty": "",
    "a link to nothing": "dangling",
    "below a file": "file/x",
}
TAKES: dict[str, tuple[str, ...]] = {
    "merge": ("merge", "PATH"),
    "merge --output": ("merge", "adapter", "--base", "base", "--output", "PATH"),
    "merge --base": ("merge", "adapter", "--base", "PATH"),
    "convert": ("convert", "PATH"),
    "convert --output": ("convert", "adapter", "--output", "PATH"),
    "convert --calibration": ("convert", "adapter", "--calibration", "PATH"),
    "expand": ("expand", "PATH"),
    "compose": ("compose", "PATH", "adapter", "--output", "both"),
    "compose --output": ("compose", "adapter", "adapter", "--output", "PATH"),
    "evaluate": ("evaluate", "PATH"),
    "evaluate side by side": ("evaluate", "PATH", "adapter"),
    "analyze": ("analyze", "PATH"),
    "analyze --output": ("analyze", "adapter", "--output", "PATH"),
    "analyze --against": ("analyze", "adapter", "--against", "PATH"),
    "serve": ("serve", "PATH", "--port", "0"),
    "serve's adapter": ("serve", "embedded", "PATH", "--port", "0"),
    "serve's named adapter": ("serve", "embedded", "a=PATH", "--port", "0"),
    "report": ("report", "PATH"),
    "report --output": ("report", "adapter", "--output", "PATH"),
    "train": ("train", "PATH"),
    "compress": ("compress", "PATH"),
    "compare": ("compare", "PATH"),
    "tasks show": ("tasks", "show", "PATH"),
    "init": ("init", "PATH"),
}
MADE = {("init", "empty"), ("init", "a link to nothing")}  # recipe.yaml in this folder; a file in the link's place
UNUSED = {("convert --output", "empty"), ("merge --output", "empty"), ("compose --output", "empty")}


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")  # type: ignore[attr-defined]
    save(adapted("lora", tiny_llama()), tmp_path / "adapter")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("back")
    (tmp_path / "back").symlink_to("circle")
    (tmp_path / "file").write_text("", "utf-8")
    return tmp_path


@pytest.mark.parametrize("name", list(TAKES))
def test_a_path_that_names_nothing(folder: Path, name: str) -> None:
    before = sorted(folder.rglob("*"))
    for kind, path in ODD.items():
        if (name, kind) in MADE:
            continue
        ended = CliRunner().invoke(app, [word.replace("PATH", path) for word in TAKES[name]])
        assert ended.exit_code == 2, (kind, ended.exception, ended.output)
        assert 20 < len(ended.output[ended.output.index("rror") :]) < 6500, (kind, ended.output)
        assert sorted(folder.rglob("*")) == before, kind


def test_a_folder_given_as_a_dot_has_its_result_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run/inner")
    assert beside(".", "dense") == tmp_path / "run/inner-dense"
    assert beside("..", "lora") == tmp_path / "run-lora"
