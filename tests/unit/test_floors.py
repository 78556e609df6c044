"""The parts of the library stand on floors: a module imports from its own floor and those below, never from above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import multiflora

SOURCE = Path(multiflora.__file__).parent

FLOORS = (
    "errors _version files suggest schema once redact yaml_file text_table stoppable tensor_file embedded machine",
    "tasks ops base_model generation kept_rows patterns tied task_ids forward_pass auxiliary_losses context",
    "peft_bridge compress methods adapter_tensors adapter_folder",
    "recipe objective data",
    "training",
    "evaluation",
    "export artifact card",
    "jobs analysis",
    "estimate",
    "comparison",
    "reports serve bench doctor integrations",
    "cli",
    "__main__",
)
"""From the ground up. docs/architecture.md says what each is for."""

FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor.split()}

PRIVATE = {"peft_bridge"}
"""Modules that import what peft, transformers or trl keep private."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import that runs, those inside functions too; not those for types alone."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


@cache
def own_imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports; the top, which loads on demand, is not looked into."""
    found: dict[str, set[str]] = {}
    for name, tree in modules().items():
        if name == "__init__":
            continue
        found[name] = set()
        for source, what in imports(tree):
            if source.startswith("multiflora."):
                module = source.removeprefix("multiflora.")
                found[name].add(f"{module}.{what}" if f"{module}.{what}" in modules() else module)
    return found


def test_every_module_has_a_floor() -> None:
    parts = {name.partition(".")[0] for name in own_imports()}
    assert parts == set(FLOOR_OF)


def test_no_module_imports_from_a_floor_above() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in own_imports().items()
        for other in sorted(others)
        if FLOOR_OF[other.partition(".")[0]] > FLOOR_OF[name.partition(".")[0]]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(own_imports()).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(error.args[1])) from error


def test_what_others_keep_private_is_imported_where_it_is_said() -> None:
    private = {
        name
        for name, tree in modules().items()
        for source, what in imports(tree)
        if source.partition(".")[0] in ("peft", "transformers", "trl") and (what.startswith("_") or "._" in source)
    }
    assert private == PRIVATE


def test_what_vllm_does_not_promise_is_imported_in_one_place() -> None:
    places = {
        name
        for name, tree in modules().items()
        for source, _ in imports(tree)
        if source.startswith(("vllm.lora", "vllm.v1"))
    }
    assert places == {"integrations.vllm", "integrations.vllm.many"}
