"""The README does what it says: its Python runs, its recipe trains, its commands exist, its tree is the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from multiflora.methods import METHODS
from multiflora.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(desk: dict[str, str], *words: str) -> str:
    done = subprocess.run(words, env=desk, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_block_is_left_untested() -> None:
    assert [len(blocks(language)) for language in ("bash", "python", "yaml")] == [2, 2, 1]
    assert len(re.findall(r"^```\w+", README, re.MULTILINE)) == 5


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_as_it_stands(number: int, desk: dict[str, str]) -> None:
    out = run(desk, sys.executable, "-c", blocks("python")[number])
    if number == 1:
        assert "macro average" in out
        assert Path("runs/python/adapter_model.safetensors").is_file()
    else:
        assert Path("runs/swap").is_dir()


def test_the_recipe_trains_by_the_commands_below_it(desk: dict[str, str]) -> None:
    Path("recipe.yaml").write_text(blocks("yaml")[0], "utf-8")
    assert len([line for line in blocks("yaml")[0].splitlines() if line]) == 10
    assert [task.name for task in load_recipe("recipe.yaml").tasks] == ["reviews", "tickets"]
    plan, trained, scored = (run(desk, *words) for words in commands(blocks("bash")[1]))
    assert "trainable parameters" in plan
    assert "macro average" in trained
    assert "macro average" in scored


def test_make_commands_are_in_the_menu() -> None:
    menu = (ROOT / "Makefile").read_text("utf-8")
    asked = [line.split()[1] for line in blocks("bash")[0].splitlines()]
    assert asked == ["demo", "test"]
    for target in asked:
        assert re.search(rf"^{target}:.* ## ", menu, re.MULTILINE), target


def test_commands_named_in_the_text_exist(desk: dict[str, str]) -> None:
    named = {" ".join(words.split()[1:2]) for words in re.findall(r"`(multiflora [a-z][^`]*)`", README)}
    assert named == {"init", "tasks", "methods"}
    run(desk, command(), "init")
    assert "gsm8k" in run(desk, command(), "tasks")
    assert "⟦" in run(desk, command(), "tasks", "show", "gsm8k")
    assert "rlora" in run(desk, command(), "methods")


def test_the_table_of_methods_is_the_table_of_methods() -> None:
    rows = re.findall(r"^\| [^|]*\| `(\w+)` \|.*\| ([^|]*) \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "lora",
        "multilora",
        "hydralora",
        "rlora",
        "mlora",
        "moelora",
        "loramoe",
        "mtllora",
        "mixlora",
        "alignlora",
        "loraga",
        "deltalora",
        "parts",
    ]
    # the one equation is of our methods and of LoRA; peft's others have forms of their own
    assert {name for name, _ in rows} == {name for name, card in METHODS.items() if card.module} | {"lora"}
    for name, merges in rows:
        assert METHODS[name].merges.startswith(merges.split()[0]), name


def test_every_place_in_the_tree_exists() -> None:
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    for line in tree[1].splitlines():
        base = ROOT / "src" / "multiflora" if line.startswith("  ") else ROOT
        for place in re.split(r"\s{3,}", line.strip())[0].split("  "):
            assert (base / place).exists(), place


def command() -> str:
    return str(Path(sys.executable).parent / "multiflora")


def commands(block: str) -> list[list[str]]:
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    assert all(words[0] == "multiflora" for words in lines)
    return [[command(), *words[1:]] for words in lines]


def test_make_commands_of_the_contributors_page_are_in_the_menu() -> None:
    menu = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    assert "test" in named
    for target in named:
        assert re.search(rf"^{target}:.* ## ", menu, re.MULTILINE), target


def test_ci_runs_the_menu_and_nothing_besides() -> None:
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert lines[-1] == "exec make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
