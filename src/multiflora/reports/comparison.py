"""A comparison's page: which method earned its parameters, and how one knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multiflora.card import base_name
from multiflora.comparison.results import Summary
from multiflora.comparison.saved import Saved
from multiflora.comparison.spec import COMPARISON
from multiflora.comparison.statistics import CLAIM
from multiflora.reports import comparison_tables as tables
from multiflora.reports import figures
from multiflora.reports.inside import Inside
from multiflora.reports.page import Code, Fold, Page, Section
from multiflora.reports.recipes import length_of, shown_recipe
from multiflora.reports.transfer import forgetting_table, transfer_tables
from multiflora.reports.tuning import tuning_section

__all__ = ["comparison_page"]


_AS_PRINTED = (
    "As printed, for their models, data and budgets; most have one run for each method and no interval. They stand "
    "here to be looked at, not to be compared number by number with those above."
)


def comparison_page(saved: Saved, inside: Inside, versions: Mapping[str, str]) -> Page:
    """Write a comparison's page.

    Args:
        saved: The comparison.
        inside: Figures and findings of what the adapters are like inside.
        versions: Package -> version, of the first training.
    """
    summary, spec = saved.summary, saved.comparison.compare
    second = Fold(
        title="A second opinion: another test of the same differences",
        text=["No claim on this page rests on it; it is for those who would have chosen it."],
        tables=[tables.second_opinions(summary)],
    )
    sections = [
        Section(
            name="result",
            title="Methods",
            tables=list(tables.methods(summary)),
            figures=list(figures.scores(summary)),
            folds=[second] if len(summary.rows) > 1 else [],
        ),
        tuning_section(summary),
        Section(
            name="tasks",
            title="Task by task",
            tables=[tables.by_task(summary), *tables.task_differences(summary)],
            figures=list(figures.task_differences(summary)),
        ),
        Section(name="single", title="Together or alone", tables=list(transfer_tables(summary))),
        Section(
            name="cost",
            title="What it costs",
            tables=[tables.cost(summary), *forgetting_table(summary)],
            figures=list(figures.forgetting(summary)),
        ),
        Section(
            name="learning",
            title="Learning curves",
            figures=[*figures.course(summary), *figures.learning_curves(summary)],
        ),
        inside.section(),
        Section(
            name="published",
            title="What the papers print",
            text=[_AS_PRINTED] if spec.published else [],
            tables=tables.published(spec.published),
        ),
        _how(saved, versions),
    ]
    return Page(
        title="Which method earned its parameters?",
        kind="Comparison",
        about=spec.about,
        warnings=_warnings(saved),
        answer=summary.answer,
        sentences=list(summary.sentences.items()),
        facts=_facts(saved),
        sections=[s for s in sections if s.text or s.tables or s.figures or s.folds or s.code],
    )


def _warnings(saved: Saved) -> list[str]:
    summary = saved.summary
    if not saved.missing:
        return []
    total = saved.missing + saved.left_out + len(summary.cells) - 1
    labels = ", ".join(row.label for row in summary.rows)
    left_out = (
        f" {saved.left_out} finished trainings are left out, as they have no counterparts to be paired with yet."
        if saved.left_out
        else ""
    )
    return [
        f"This comparison is not finished: {saved.missing} of {total} trainings are missing. What follows rests on "
        f"{_seeds(summary)} of {labels}.{left_out}"
    ]


def _seeds(summary: Summary) -> str:
    numbers = ", ".join(map(str, summary.seeds))
    return f"seed {numbers}" if len(summary.seeds) == 1 else f"seeds {numbers}"


def _facts(saved: Saved) -> list[tuple[str, str]]:
    summary, recipe = saved.summary, saved.comparison.recipe
    steps = length_of(recipe.train)
    trained = [task for task in summary.metrics if task not in summary.extra]
    return [
        ("Model", base_name(recipe.model)),
        ("Equal for all", summary.budget),
        ("Tasks", ", ".join(f"{task} ({summary.counts[task]:,} rows)" for task in trained)),
        ("Trainings", f"{len(summary.rows)} methods with {_seeds(summary)}"),
        ("Each", f"{steps} of {recipe.train.batch_size * recipe.train.gradient_accumulation} examples"),
        ("Machine", "CPU" if summary.device == "cpu" else summary.device),
    ]


def _looks(summary: Summary) -> str:
    """Which of several looks this is; nothing where there is one."""
    look = summary.look
    if look is None or (len(look.planned) == 1 and not look.extra):
        return ""
    if look.extra:
        return f", as a look with {look.seeds} seeds was not planned"
    place = look.planned.index(look.seeds) + 1 if look.seeds in look.planned else "none"
    return f", as this is look {place} of at most {len(look.planned)} that share the level {CLAIM}"


def _how(saved: Saved, versions: Mapping[str, str]) -> Section:
    summary, folder = saved.summary, saved.folder.resolve().name
    spec = saved.comparison.compare
    text = [
        "All methods were trained with the same seeds on the same examples and scored on the same rows, so everything "
        "is paired. A difference's interval and p allow for the chance of seeds and of rows together, each pair of "
        "methods by its own spread over seeds; p is corrected for all methods and measures (Holm). A difference is "
        f"claimed where that p is below {CLAIM if summary.look is None else f'{summary.look.level:.2g}'}"
        f"{_looks(summary)}.",
    ]
    if versions:
        text.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    folds = [
        Fold(title=title, text=list(lines))
        for title, lines in (
            ("What the paper states, followed here", spec.stated),
            ("What the paper leaves open, chosen here", spec.chosen),
        )
        if lines
    ]
    commands = (
        f"multiflora compare {COMPARISON} --output again   # without --output it goes on where it stopped\n"
        f"multiflora analyze {folder}\n"
        f"multiflora report {folder}"
    )
    return Section(
        name="how",
        title="How it was done, and how to do it again",
        text=text,
        tables=[tables.tasks(saved.comparison.recipe, summary)],
        folds=folds,
        code=[
            Code("Commands", commands),
            Code(f"The comparison ({folder}/{COMPARISON})", shown_recipe(saved.comparison.to_yaml(Path(saved.folder)))),
        ],
    )
