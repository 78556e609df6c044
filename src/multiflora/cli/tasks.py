"""``multiflora tasks``: the shipped tasks, and one task's examples as the model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stderr, stdout
from multiflora.text_table import TextTable

if TYPE_CHECKING:
    from multiflora.recipe import ModelSpec
    from multiflora.tasks.example import Example
    from multiflora.tasks.preview import Piece

__all__ = ["tasks_app"]

tasks_app = typer.Typer(name="tasks", invoke_without_command=True)


@tasks_app.callback()
def list_tasks(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the shipped tasks, or show one: `multiflora tasks show gsm8k`."""
    if ctx.invoked_subcommand:
        return
    from multiflora.tasks.shipped import shipped_tasks

    specs = [shipped.spec for shipped in shipped_tasks().values()]
    if as_json:
        print_json({spec.name: spec.model_dump(mode="json", exclude_none=True) for spec in specs})
        return
    table = TextTable("task", "what it asks", "scored by", "source", "licence")
    for spec in specs:
        place = getattr(spec.source, "path", None) or getattr(spec.source, "generator", "files")
        table.add_row(spec.name, spec.about, spec.score, place, spec.licence)
    stdout.print(table)


@tasks_app.command("show")
def show(
    name: Annotated[
        str, typer.Argument(help="A shipped task, or the path of a task file or data file.", metavar="NAME")
    ],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Take the task, and the model, from a recipe.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Show the tokens of this model: hub id or folder.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many examples.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Render a task's examples exactly as the model will see them; what carries loss stands in ⟦brackets⟧."""
    from multiflora.recipe import ModelSpec, load_recipe
    from multiflora.tasks.kind import explain
    from multiflora.tasks.preview import preview, sample_examples
    from multiflora.tasks.resolve import load_task
    from multiflora.tasks.shipped import ShippedTask, shipped_tasks

    plan = None if recipe is None else load_recipe(recipe)
    task = plan.task(name) if plan else shipped_tasks().get(name) or load_task(name)
    spec = ModelSpec(name=model) if model else plan.model if plan else None
    with log_on_stderr():
        examples = sample_examples(task, count)
        pieces = [None] * len(examples) if spec is None else _tokens(examples, spec)
        scored = explain([task.spec if isinstance(task, ShippedTask) else task])
    if as_json:
        words = {"scored": next(iter(scored.values()))}
        print_json({"task": name, **words, "examples": [asdict(example) for example in examples]})
        return
    stdout.print(*scored.values(), "", sep="\n", markup=False, soft_wrap=True)
    for example, tokens in zip(examples, pieces, strict=True):
        stdout.print(preview(example, tokens), "", sep="\n", soft_wrap=True)
    if spec is None:
        stderr.print("Add --model MODEL to see the tokens of its tokenizer, each in brackets of its own.", style="dim")


def _tokens(examples: Sequence[Example], spec: ModelSpec) -> list[list[Piece]]:
    """The tokens of each example and whether they carry loss, from the code that encodes for training."""
    from multiflora.base_model import load_tokenizer
    from multiflora.data.encode import encode_example
    from multiflora.tasks.preview import pieces_of

    tokenizer, chat = load_tokenizer(spec), spec.chat_template
    encoded = [encode_example(example, tokenizer, chat_template=chat) for example in examples]
    return [pieces_of(tokenizer, each.ids, each.loss) for each in encoded]
