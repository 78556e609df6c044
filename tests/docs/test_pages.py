"""The pages do what they say: their Python runs, their recipes are read, their commands are the program's."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pages import HUB_NAME, ROOT, Block, blocks, blocks_of, lay_out, pages

from multiflora.cli import app
from multiflora.comparison.spec import load_comparison
from multiflora.methods import METHODS
from multiflora.recipe import recipe_from
from multiflora.training.adapter import adapter_config

# whose code other programs read: tests/integrations has them read it
PROGRAMS = "integrations.md"

# what a page may show besides: its words are read by no program of ours
OTHERS = {"axolotl", "make", "pip", "swift", "vllm", "llama-server", "curl", "python", "torchrun", "accelerate"}

PYTHON = [page for page in pages() if page != PROGRAMS and any(block.language == "python" for block in blocks_of(page))]


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_no_block_is_of_a_language_that_nothing_checks() -> None:
    known = {"python", "yaml", "bash", "console", "text"}
    assert not [named(block) for page in pages() for block in blocks_of(page) if block.language not in known]


def test_every_kind_of_block_is_found() -> None:
    # were the pages' form to change, the tests below would find nothing and pass
    for language in ("python", "yaml", "bash"):
        assert len(blocks(language)) >= sum(card.module is not None for card in METHODS.values()), language


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> dict[str, str | None]:
    """What happened to each page's Python."""
    plan: dict[str, Any] = {}
    for page in PYTHON:
        folder = lay_out(tmp_path_factory.mktemp(Path(page).stem))
        plan[page] = {
            "folder": str(folder),
            "blocks": [block.text for block in blocks_of(page) if block.language == "python"],
        }
    report = tmp_path_factory.mktemp("report") / "plan.json"
    report.write_text(json.dumps(plan), "utf-8")
    runner = Path(__file__).with_name("run_python.py")
    done = subprocess.run(
        [sys.executable, runner, report], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(report.read_text("utf-8"))
    return found


@pytest.mark.parametrize("page", PYTHON)
def test_a_page_s_python_runs(page: str, failures: dict[str, str | None]) -> None:
    assert failures[page] is None, failures[page]


# what a block that shows a part of a recipe leaves out
REST = {"model": HUB_NAME, "tasks": ["./reviews.jsonl"], "output": "runs/part"}


# the quick start's files are made by its own first block, so its recipe is trained below
ELSEWHERE = ("quickstart.md", PROGRAMS)


@pytest.mark.parametrize("block", [block for block in blocks("yaml") if block.page not in ELSEWHERE], ids=named)
def test_a_recipe_is_read(block: Block, desk: dict[str, str]) -> None:
    written = REST | yaml.safe_load(block.text)
    if "compare" in written:
        assert load_comparison(written).compare.methods
    else:
        adapter_config(recipe_from({"method": "lora"} | written))


@pytest.mark.parametrize("block", [*blocks("bash"), *blocks("console")], ids=named)
def test_commands_are_the_program_s(block: Block) -> None:
    for words in lines_of(block):
        # also as `torchrun ... -m multiflora train`; ms-swift has it as the name of a tuner
        if "multiflora" in words and words[0] != "swift":
            parse(words[words.index("multiflora") :])
        else:
            assert words[0] in OTHERS, f"{named(block)}: nothing knows {words[0]}"


def test_commands_in_the_text_are_the_program_s() -> None:
    known = commands(typer.main.get_command(app), "multiflora")
    for page in pages():
        text = (ROOT / "docs" / page).read_text("utf-8")
        for said in re.findall(r"`(multiflora(?: [a-z]+)+)(?=[ `])", text):
            assert any(f"{said} ".startswith(f"{name} ") for name in known), f"{page}: {said}"


def test_make_targets_are_in_the_menu() -> None:
    menu = (ROOT / "Makefile").read_text("utf-8")
    for page in pages():
        for target in re.findall(r"`make ([a-z-]+)`", (ROOT / "docs" / page).read_text("utf-8")):
            assert re.search(rf"^{target}:.* ## ", menu, re.MULTILINE), f"{page}: {target}"


@pytest.mark.slow
def test_the_quick_start_from_its_first_block_to_its_last(desk: dict[str, str]) -> None:
    """Its files, recipe and commands in their order; the embedded model's place is taken by the smallest there is."""
    program = str(Path(sys.executable).parent / "multiflora")
    python, recipe, bash = ([b.text for b in blocks_of("quickstart.md") if b.language == kind] for kind in KINDS)
    subprocess.run([sys.executable, "-c", python[0]], env=desk, check=True)
    assert "model: embedded" in recipe[0]
    small = recipe[0].replace("model: embedded", f"model: {HUB_NAME}").replace("max_steps: 40", "max_steps: 2")
    Path("recipe.yaml").write_text(small, "utf-8")
    said = []
    for block in bash[1:]:
        for line in block.splitlines():
            words = [program, *shlex.split(line, comments=True)[1:]]
            done = subprocess.run(words, env=desk, capture_output=True, text=True, timeout=1200, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            said.append(done.stdout)
    assert "trainable parameters" in said[0]
    assert "macro average" in said[1]
    assert "macro average" in said[2]


KINDS = ("python", "yaml", "bash")


def test_every_method_of_ours_has_a_page() -> None:
    missing = [card.name for card in METHODS.values() if card.module and f"methods/{card.name}.md" not in pages()]
    assert not missing


@pytest.mark.parametrize("name", [name for name in METHODS if f"methods/{name}.md" in pages()])
def test_a_method_s_page_says_all_that_a_reader_needs(name: str) -> None:
    page = f"methods/{name}.md"
    text = (ROOT / "docs" / page).read_text("utf-8")
    for part in ("## Idea", "## Equation", "## Cost", "## Settings", "## Train", "## When to use it", "## When not"):
        assert f"\n{part}\n" in text, f"{page} lacks {part!r}"
    number = METHODS[name].paper.removeprefix("arXiv ")
    assert number == METHODS[name].paper or f"arxiv.org/abs/{number}" in text
    assert {block.language for block in blocks_of(page)} >= {"yaml", "python", "bash"}
    assert f"name: {name}" in "".join(block.text for block in blocks_of(page) if block.language == "yaml")


def lines_of(block: Block) -> list[list[str]]:
    """A block's commands as words; a line that ends in a backslash goes on."""
    text = block.text.replace("\\\n", " ")
    found = (shlex.split(line, comments=True) for line in text.splitlines())
    return [list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)) for words in found if words]


def parse(words: list[str]) -> None:
    """Let the program's own parser read a command, without running it."""
    command = typer.main.get_command(app)
    context: Any = None
    rest = words[1:]
    while getattr(command, "commands", None):
        context = command.make_context(words[0], list(rest), parent=context, allow_interspersed_args=False)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not rest:
            return
        _, command, rest = command.resolve_command(context, rest)
    command.make_context(words[0], list(rest), parent=context)


def commands(command: Any, name: str) -> list[str]:
    """Every command's full name."""
    found = []
    for word, inner in getattr(command, "commands", {}).items():
        found += [f"{name} {word}", *commands(inner, f"{name} {word}")]
    return found
