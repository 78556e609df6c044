"""One run's page: every task before and after, and what can be said from one training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from multiflora.card import base_name, best_words, start_words
from multiflora.evaluation.results import LOWER_IS_BETTER, macro_stderr
from multiflora.methods import METHODS
from multiflora.recipe import Recipe
from multiflora.reports import figures
from multiflora.reports.inside import Inside
from multiflora.reports.page import Code, Page, Section
from multiflora.reports.recipes import length_of, shown_recipe
from multiflora.reports.tables import NOTHING, Cell, Column, Table, number, word

__all__ = ["run_page"]


def run_page(folder: Path, recipe: Recipe, results: Mapping[str, Any], run: Mapping[str, Any], inside: Inside) -> Page:
    """Write a run's page.

    Args:
        folder: Its output folder.
        recipe: The resolved recipe.
        results: What ``results.json`` holds.
        run: What ``run.json`` holds.
        inside: Figures of what the adapter is like inside.
    """
    method, training = METHODS[recipe.method.name], results["training"]
    sections = [
        Section(
            name="result",
            title="Scores",
            tables=[_scores(results)],
            figures=list(figures.run_scores(results["base"], results["adapted"])),
        ),
        Section(
            name="learning",
            title="Training",
            tables=list(_mixture(recipe, results["mixture"])),
            text=[words.strip() for words in (start_words(training), best_words(training)) if words],
            figures=[
                *figures.validation_curves(training.get("validation", []), training.get("best")),
                *figures.run_curves(training.get("log", [])),
            ],
        ),
        inside.section(),
        _how(folder, recipe, run),
    ]
    return Page(
        title=f"{method.title} on {len(recipe.tasks)} task{'' if len(recipe.tasks) == 1 else 's'}",
        kind="Run",
        about=method.line,
        warnings=list(run["notes"]),
        answer=_answer(results),
        sentences=[],
        facts=_facts(recipe, results, run),
        sections=[s for s in sections if s.text or s.tables or s.figures or s.code],
    )


def _macro(results: Mapping[str, Any]) -> Cell:
    """The macro average, its standard error below."""
    cell, error = number(results["macro"], 1, factor=100), macro_stderr(results["tasks"])
    if error is None or results["macro"] is None:
        return cell
    return Cell(cell.text, (results["macro"], error), f"± {100 * error:.1f}")


def _answer(results: Mapping[str, Any]) -> str:
    """What was found, and what one training leaves open."""
    before, after = results["base"], results["adapted"]
    if after["macro"] is None:
        said = "No task of this run has a score of which higher is better; the table has each task's nats per token."
    elif not before or before["macro"] is None:
        said = f"The macro score is {100 * after['macro']:.1f} points of 100; the base model was not scored."
    else:
        old, new = (f"{100 * results['macro']:.1f}" for results in (before, after))
        way = "rose" if after["macro"] > before["macro"] else "fell"
        moved = f"stayed at {old}" if old == new else f"{way} from {old} to {new}"
        said = f"The macro score {moved} points of 100 on these test rows."
    return (
        f"{said} This is one training with one seed: how another would come out, and whether another method does "
        "better, is for multiflora compare to say."
    )


def _facts(recipe: Recipe, results: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, counts = recipe.train, results["parameters"]
    done = results["training"].get("steps")
    steps = length_of(train if done is None else train.model_copy(update={"max_steps": done}))
    trained = f"{counts['trainable']:,} of {counts['total']:,} parameters" if counts.get("trainable") else ""
    seconds = run["seconds"].get("train")
    facts = [
        ("Model", base_name(recipe.model)),
        ("Method", f"{METHODS[recipe.method.name].title} ({METHODS[recipe.method.name].paper})"),
        ("Trained", trained),
        ("Training", f"{steps} of {train.batch_size * train.gradient_accumulation} examples, seed {recipe.seed}"),
        ("Learning rate", f"{train.learning_rate:g}"),
        ("Time", f"{seconds:,.0f} seconds" if seconds is not None else ""),
        ("Machine", "CPU" if run["machine"]["device"] == "cpu" else run["machine"]["device"]),
    ]
    return [(name, value) for name, value in facts if value]


def _scores(results: Mapping[str, Any]) -> Table:
    before, after = results["base"], results["adapted"]
    columns = [
        Column("Task", ("task",), numeric=False),
        Column("Metric", ("metric",), numeric=False),
        Column("Test rows", ("rows",)),
        *([Column("Before", ("before", "before_stderr"))] if before else []),
        Column("After", ("after", "after_stderr")),
        *([Column("Change", ("change", "change_stderr"))] if before else []),
        Column("Nats after", ("nats_after",)),
    ]
    notes = {"tasks": "", "extra": "not trained on", "harness": "of the harness"}
    rows = []
    for name, score in after["tasks"].items():
        old = before["tasks"].get(name) if before else None
        rows.append(
            [
                word(name, notes.get(score["group"], "")),
                word(score["metric"]),
                number(score["n"]),
                *([_score(old)] if before else []),
                _score(score),
                *([_change(old, score)] if before else []),
                number(score["nll"], 4),
            ]
        )
    if after["macro"] is not None:
        old_macro = before["macro"] if before else None
        change = None if old_macro is None else after["macro"] - old_macro
        rows.append(
            [
                word("macro average"),
                NOTHING,
                NOTHING,
                *([_macro(before)] if before else []),
                _macro(after),
                *([number(change, 1, factor=100, signed=True)] if before else []),
                NOTHING,
            ]
        )
    return Table(
        name="table-scores",
        title="Every task",
        reading="In points of 100 (nats per token where the metric is nll: there lower is better), with one standard "
        "error over test rows below. That of a change takes both scores as independent, which errs towards too much; a "
        "change of less than twice its standard error may be the rows' chance.",
        columns=columns,
        rows=rows,
    )


def _scale(score: Mapping[str, Any]) -> tuple[float, int]:
    return (1.0, 4) if score["metric"] in LOWER_IS_BETTER else (100.0, 1)


def _score(score: Mapping[str, Any] | None) -> Cell:
    if score is None:
        return NOTHING
    factor, digits = _scale(score)
    error = score["stderr"]
    return Cell(
        f"{score['score'] * factor:.{digits}f}",
        (score["score"], error),
        "" if error is None else f"± {error * factor:.{digits}f}",
    )


def _change(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Cell:
    if old is None:
        return NOTHING
    factor, digits = _scale(new)
    errors = (old["stderr"], new["stderr"])
    error = None if None in errors else math.hypot(*errors)
    change = new["score"] - old["score"]
    return Cell(
        f"{change * factor:+.{digits}f}", (change, error), "" if error is None else f"± {error * factor:.{digits}f}"
    )


def _mixture(recipe: Recipe, report: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    if not report:
        return
    with_loss = max(sum(row["loss_tokens"] for row in report.values()), 1)
    yield Table(
        name="table-mixture",
        title="What was trained on",
        reading=f"How often each task was drawn (mixture: {recipe.mixture.strategy}), and which share of the tokens "
        f"that carry loss is its own. {recipe.train.in_words()}",
        columns=[
            Column("Task", ("task",), numeric=False),
            Column("Examples", ("examples",)),
            Column("Share", ("share_of_examples",)),
            Column("Tokens", ("tokens",)),
            Column("Share of tokens", ("share_of_tokens",)),
            Column("Share of labelled tokens", ("share_of_loss_tokens",)),
        ],
        rows=[
            [
                word(task),
                number(row["examples"]),
                number(row["share_of_examples"], 1, factor=100, unit=" %"),
                number(row["tokens"]),
                number(row["share_of_tokens"], 1, factor=100, unit=" %"),
                number(row["loss_tokens"] / with_loss, 1, factor=100, unit=" %"),
            ]
            for task, row in report.items()
        ],
    )


def _how(folder: Path, recipe: Recipe, run: Mapping[str, Any]) -> Section:
    name = folder.resolve().name
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    commands = (
        f"multiflora train recipe.yaml --output again\nmultiflora evaluate {name}\nmultiflora analyze {name}\n"
        f"multiflora report {name}"
    )
    return Section(
        name="how",
        title="How to do it again",
        text=[f"Versions: {versions}."] if versions else [],
        code=[
            Code("Commands", commands),
            Code(f"The recipe ({name}/recipe.yaml)", shown_recipe(recipe.to_yaml(folder))),
        ],
    )
