"""A converted adapter scored beside the adapter it comes from, on the tasks of the run that trained it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from multiflora.errors import ExportError
from multiflora.export.report import Report, TaskScores
from multiflora.files import user_path, write_json

__all__ = ["with_scores"]


def with_scores(run: str | Path, report: Report, *, limit: int | None = None, split: str = "test") -> Report:
    """Score every task of a run before and after conversion, and add the scores to ``report.json``.

    Args:
        run: The run's output folder; its recipe names model and tasks.
        report: Of the conversion of its adapter to plain LoRA.
        limit: Examples of each task; None: all.
        split: ``test`` or ``validation``.

    Raises:
        ExportError: The folder holds no recipe, so its tasks are not known.
    """
    from peft import PeftModel

    from multiflora.evaluation.load import load_target
    from multiflora.evaluation.run import evaluate

    folder = user_path(run)
    if not (folder / "recipe.yaml").is_file():
        raise ExportError(f"{folder} holds no recipe.yaml, so there are no tasks to score on; leave --score out.")
    adapted, tokenizer, recipe = load_target(folder)
    assert recipe is not None
    words: dict[str, Any] = {
        "split": split,
        "limit": limit,
        "batch_size": recipe.evaluate.batch_size,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "chat_template": recipe.model.chat_template,
    }
    tasks = {task.name: task for task in recipe.tasks}
    before = evaluate(adapted, tokenizer, list(tasks.values()), **words)["tasks"]
    base = adapted.unload()
    scores = []
    for made in report.adapters:
        chosen = list(tasks.values()) if made.task is None else [tasks[made.task]]
        model = PeftModel.from_pretrained(base, str(report.folder(made))).eval()
        after = evaluate(model, tokenizer, chosen, **words)["tasks"]
        base = model.unload()
        for task in chosen:
            was, now = before[task.name], after[task.name]
            scores.append(
                TaskScores(
                    task.name,
                    was["metric"],
                    was["n"],
                    was["score"],
                    now["score"],
                    was["stderr"],
                    was["nll"],
                    now["nll"],
                )
            )
    told = replace(report, scores=tuple(scores))
    write_json(report.output / "report.json", told.to_dict())
    return told
