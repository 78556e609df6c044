"""The tables of the documentation, as Markdown, made from the code when the site is built.

A page says, in a fenced block, which table it wants; nothing that the code knows is typed by hand:

- ``{method-facts} rlora``: what a method is, from its card.
- ``{method-settings} rlora``: its settings, their defaults and what they mean, from its config.
- ``{method-cost} rlora``: what it adds to a layer, from its description.
- ``{methods}``, ``{peft-methods}``: all methods; those of peft.
- ``{recipe-keys} TrainSpec``: the keys of a part of the recipe, from the docstrings of its fields.
- ``{shipped-tasks}``: the tasks that come with the package.
- ``{command-line}``: every command and option.
- ``{pages} Results: results/*``: a part of the navigation, from the pages that match.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft  # before anything of ours: importing it registers the methods, which the tables read
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

if TYPE_CHECKING:
    from multiflora.methods import MethodCard

DOCS = Path(__file__).parents[1] / "docs"

# the layer that costs are shown for: an up-projection of Qwen2.5-0.5B
LAYER = ("up_proj", 896, 4864)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield ""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def methods() -> Iterator[str]:
    """All methods, each with a link to its page."""
    from multiflora.methods import METHODS

    rows = [(_linked(card), f"`{card.name}`", card.line, card.merges) for card in METHODS.values()]
    yield from table(("method", "in a recipe", "idea", "merges"), rows)


def _linked(card: MethodCard) -> str:
    """A method's title, linked to its page, or to the one that all of peft's methods share."""
    own = (card.name, "baselines" if card.module is None else None)
    page = next((name for name in own if name and (DOCS / "methods" / f"{name}.md").is_file()), None)
    return f"[{card.title}](/methods/{page}.md)" if page else card.title


def peft_methods() -> Iterator[str]:
    """peft's own methods, with the words that are theirs alone."""
    from multiflora.methods import METHODS

    rows = [
        (
            card.title,
            f"`{card.name}`",
            card.line,
            paper_link(card.paper),
            ", ".join(f"`{word}`" for word in card.settings),
        )
        for card in METHODS.values()
        if card.module is None and card.name not in ("lorahub", "losparse")  # which are not peft's
    ]
    yield from table(("method", "in a recipe", "idea", "paper", "its own settings"), rows)


def method_facts(name: str) -> Iterator[str]:
    """What a method is, from its card and description."""
    from multiflora.methods import METHODS, describe
    from multiflora.methods.base import Method

    card, method = METHODS[name], describe(name)
    reads = method.gate.reads if isinstance(method, Method) else "nothing"
    needs = {
        "nothing": "nothing: one update for all tokens",
        "token": "the token: no task is needed, in training or afterwards",
        "task": "the row's task, in training and afterwards",
    }
    depends = needs[reads]
    if isinstance(method, Method) and method.chosen is not None:
        depends = "what its gate reads: nothing, the row's task or the token"
    elif isinstance(method, Method) and method.loss_needs_task(method.config()):
        depends = "nothing: one update for all tokens; the loss needs the row's task, in training alone"
    python = f"`multiflora.{card.config}`" if card.module else f"`peft.{card.config}`"
    rows = [
        ("paper", paper_link(card.paper)),
        ("in a recipe", f"`method: {card.name}`"),
        *([("in Python", python)] if card.config else []),
        ("the update depends on", depends),
        ("merges", card.merges),
        *[("measured here", found) for found in measured(name)],
    ]
    yield from table(("", ""), rows)


def measured(name: str) -> Iterator[str]:
    """How the method did in each comparison of docs/results, beside that comparison's reference."""
    from multiflora.comparison.statistics import CLAIM

    for path in sorted((DOCS / "results").glob("*/summary.json")):
        summary = json.loads(path.read_text("utf-8"))
        rows = {row["label"]: row for row in summary["rows"] if row["score"]}
        reference = rows[summary["reference"]]
        page = path.parent.with_suffix(".md")
        title = page.read_text("utf-8").splitlines()[0].removeprefix("# ")
        where = f"[{title}](/results/{page.name})"
        for label, row in rows.items():
            if row["method"] != name:
                continue
            called = "" if label == name else f"{label}, "
            score, difference = row["score"], row["score"]["difference"]
            text = f"{where}: {called}{score['mean']['mean']:.1%} macro score"
            if row is not reference and difference is not None and score["p"] is not None:
                low, high = (100 * difference["interval"][end] for end in ("low", "high"))
                word = "no difference shown" if score["p"] >= CLAIM else "better" if low > 0 else "worse"
                theirs = f"{summary['reference']} {reference['score']['mean']['mean']:.1%}"
                text += f", {theirs}: {word} ({low:+.1f} to {high:+.1f} points)"
            yield text


def paper_link(paper: str) -> str:
    """``arXiv 2106.09685`` with its address."""
    number = paper.removeprefix("arXiv ")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def method_settings(name: str) -> Iterator[str]:
    """A method's own settings, and the shared ones it has defaults of its own for."""
    from multiflora.methods import METHODS
    from multiflora.methods.config import AdapterConfig

    card = METHODS[name]
    assert card.module is not None, f"{name} is peft's own: its settings are peft's"
    config = getattr(import_module(card.module), card.config)
    shared = {item.name: default_of(item) for item in dataclasses.fields(AdapterConfig)}
    common = ("r", "lora_alpha", "lora_dropout")
    rows = []
    for item in dataclasses.fields(config):
        if "help" not in item.metadata or not item.init:
            continue
        if item.name in common or item.name not in shared or default_of(item) != shared[item.name]:
            rows.append((f"`{item.name}`", f"`{written(default_of(item))}`", item.metadata["help"]))
    yield from table(("setting", "default", "meaning"), rows)


def shared_settings() -> Iterator[str]:
    """The settings that all multi-branch methods share."""
    from multiflora.methods.config import AdapterConfig

    bookkeeping = {item.name for item in dataclasses.fields(peft.PeftConfig)}
    rows = [
        (f"`{item.name}`", f"`{written(default_of(item))}`", item.metadata["help"])
        for item in dataclasses.fields(AdapterConfig)
        if item.name not in bookkeeping and not item.metadata["help"].startswith("Not supported")
    ]
    yield from table(("setting", "default", "meaning"), rows)


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def written(value: Any) -> str:
    """A default as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def method_cost(name: str) -> Iterator[str]:
    """Parameters and operations that a method adds to one layer, beside those of LoRA."""
    from multiflora.comparison.budget import Width, count_flops, count_parameters, solve_rank
    from multiflora.methods import METHODS, build_config, describe

    layer = Width(*LAYER)
    tasks = {"num_tasks": 5} if getattr(describe(name), "needs_task", lambda: False)() else {}

    def row(title: str, which: str, settings: dict[str, Any]) -> tuple[str, ...]:
        method, config = describe(which), build_config(which, settings)
        flops = count_flops(method, config, [layer])
        return (
            title,
            f"{count_parameters(method, config, [layer]):,}",
            f"{flops.forward:,}",
            f"{flops.training:,}",
        )

    card = METHODS[name]
    config = build_config(name, tasks)
    own = count_parameters(describe(name), config, [layer])
    equal = solve_rank("lora", {}, [layer], own).rank
    few = " (5 tasks)" if tasks else ""
    rows = [row(f"{card.title}, its defaults: rank {config.r}{few}", name, tasks)]
    for rank in sorted({config.r, equal}):
        what = ", as many parameters" if rank == equal else ""
        rows.append(row(f"LoRA of rank {rank}{what}", "lora", {"r": rank}))
    yield from table(("", "parameters", "operations per token, forward", "forward and backward"), rows)
    yield f"Of one layer of {LAYER[1]:,} inputs and {LAYER[2]:,} outputs; a multiply-add counts as two."


def recipe_keys(name: str) -> Iterator[str]:
    """The keys of a part of the recipe."""
    model = recipe_model(name)
    rows = []
    for key, item in model.model_fields.items():
        if item.is_required():
            default = "required"
        elif item.default_factory is not None:
            default = "see below"
        else:
            default = default_text(item.default)
        assert item.description, f"{name}.{key} has no docstring"
        rows.append((f"`{key}`", kinds(item.annotation), default, " ".join(item.description.split())))
    yield from table(("key", "what it takes", "default", "meaning"), rows)


def recipe_model(name: str) -> type[BaseModel]:
    """A model of the recipe by its name, wherever it is defined."""
    for module in (
        "multiflora.recipe",
        "multiflora.tasks.spec",
        "multiflora.comparison.spec",
        "multiflora.compress.spec",
    ):
        found = getattr(import_module(module), name, None)
        if found is not None:
            model: type[BaseModel] = found
            return model
    raise ValueError(f"there is no part of a recipe called {name}")


def default_text(value: Any) -> str:
    """A key's default; a section's own defaults are its own table."""
    if isinstance(value, BaseModel) or value is PydanticUndefined:
        return "see below"
    if value == "":
        return "empty"
    return f"`{written(value)}`"


_PLAIN = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", Path: "path", Any: "any"}


def kinds(annotation: Any) -> str:
    """What a key takes, in words."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation is type(None):
        return "`null`"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kinds(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{written(choice)}`" for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kinds(part) for part in inner if part is not type(None)))
    if origin is tuple:
        return f"list of {kinds(inner[0])}"
    if origin is dict:
        return "mapping"
    return {"TaskSpec": "tasks", "MessageSpec": "messages"}.get(getattr(annotation, "__name__", ""), "mapping")


def pages(wanted: str) -> Iterator[str]:
    """A part of the navigation: caption, colon, patterns of pages; those that the index names are left out."""
    caption, _, patterns = wanted.partition(":")
    named = set((DOCS / "index.md").read_text("utf-8").splitlines())
    paths = [path for pattern in patterns.split() for path in sorted(DOCS.glob(f"{pattern}.md"))]
    found = [name for path in paths if (name := path.relative_to(DOCS).with_suffix("").as_posix()) not in named]
    if found:
        yield from ("```{toctree}", ":hidden:", f":caption: {caption}", "", *(f"/{name}" for name in found), "```")


def shipped_tasks() -> Iterator[str]:
    """The tasks that come with the package."""
    from multiflora.tasks.shipped import shipped_tasks as shipped

    rows = []
    for item in shipped().values():
        spec = item.spec
        place = getattr(spec.source, "path", None) or f"reasoning-gym: {getattr(spec.source, 'generator', '')}"
        rows.append((f"`{spec.name}`", spec.about, spec.score, place, spec.licence))
    yield from table(("task", "what it asks", "scored by", "source", "licence"), rows)


def command_line() -> Iterator[str]:
    """Every command with its arguments and options."""
    import typer.main

    from multiflora.cli import app

    group = typer.main.get_command(app)
    yield from _commands("multiflora", group)


def _commands(path: str, command: Any) -> Iterator[str]:
    if path != "multiflora":
        yield f"**`{path}`**" + "".join(f" `{word}`" for word in _arguments(command))
        yield ""
        yield " ".join((command.help or "").split())
    rows = []
    for item in command.params:
        if item.param_type_name == "argument":
            rows.append((f"`{_word(item)}`", "", item.help or ""))
        elif item.name != "help":
            given = getattr(item.default, "value", item.default)
            default = "" if item.is_flag or given in (None, ()) else f"`{given}`"
            rows.append((", ".join(f"`{name}`" for name in item.opts), default, item.help or ""))
    if rows:
        yield from table(("", "default", "meaning"), rows)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield ""
        yield from _commands(f"{path} {name}", inner)


def _arguments(command: Any) -> Iterator[str]:
    for item in command.params:
        if item.param_type_name == "argument":
            yield _word(item)


def _word(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


TABLES: dict[str, tuple[Callable[..., Iterable[str]], int]] = {
    "methods": (methods, 0),
    "peft-methods": (peft_methods, 0),
    "method-facts": (method_facts, 1),
    "method-settings": (method_settings, 1),
    "method-cost": (method_cost, 1),
    "shared-settings": (shared_settings, 0),
    "recipe-keys": (recipe_keys, 1),
    "shipped-tasks": (shipped_tasks, 0),
    "command-line": (command_line, 0),
    "pages": (pages, 1),
}
