"""The main job: a recipe in, one adapter for all its tasks and a table of every task before and after out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import set_seed

from multiflora.artifact import fingerprint, write_artifact
from multiflora.base_model import load_config, load_model, load_tokenizer
from multiflora.data.prepare import Examples, encode_tasks
from multiflora.evaluation.load import load_target
from multiflora.evaluation.results import Results, deciding_score, goodness
from multiflora.evaluation.run import evaluate
from multiflora.evaluation.table import results_table
from multiflora.files import write_json, write_text
from multiflora.jobs.lorahub import check_lorahub, fit_and_compose
from multiflora.methods import METHODS
from multiflora.once import once
from multiflora.recipe import Recipe, recipe_from
from multiflora.redact import refuse_secrets, without_secrets
from multiflora.training.adapter import (
    adapted_on_meta,
    adapter_config,
    add_adapter,
    check_answers,
    check_saving,
    is_saved_otherwise,
    notes_on,
    parameter_counts,
    probe,
    save_adapter,
    start_of,
)
from multiflora.training.arguments import steps_of
from multiflora.training.best import KeepBest, best_of
from multiflora.training.course import check_course, course_of, validation_of
from multiflora.training.engines import require_engine
from multiflora.training.fit import fit
from multiflora.training.init_from import check_earlier, start_from
from multiflora.training.output import check_data, disk_guard, only_run, open_output
from multiflora.training.packing import require_separate_examples
from multiflora.training.precision import weights_of
from multiflora.training.processes import is_first_process, is_sharded, num_processes, own_device
from multiflora.training.quiet import quiet_libraries
from multiflora.training.rewards import load_rewards
from multiflora.training.trackers import require_trackers

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RunResult", "train"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    output: Path
    """Folder with the adapter, the recipe, the results and the model card."""
    results: dict[str, Any]
    """What ``results.json`` holds: scores before and after, and the mixture."""
    log: list[dict[str, Any]]
    """The training log, one mapping for each line, with the speed."""

    def table(self) -> Table:
        """Return every task's score before and after as a rich table; empty in all processes but the first."""
        return results_table(self.results.get("adapted", {"tasks": {}, "macro": None}), self.results["base"])


def train(recipe: Recipe | Mapping[str, Any] | str | Path, *, resume: bool = False, quiet: bool = False) -> RunResult:
    """Train one adapter on all tasks of a recipe, score every task before and after, and save it all.

    Args:
        recipe: A recipe, a mapping with its keys, or the path of a YAML file.
        resume: Go on from the last checkpoint in the recipe's output folder.
        quiet: Show no progress on stderr.
    Raises:
        ConfigError: The recipe has problems or holds a secret, or its output folder holds something already.
        DataError: A task's data cannot be used.
        EnvironmentProblem: Something outside is missing: a package, space on the disk.
    Example:
        >>> multiflora.train("recipe.yaml").table()  # doctest: +SKIP
    """
    recipe = recipe_from(recipe)
    refuse_secrets([recipe.to_yaml()], "The recipe")
    with only_run(recipe.output) if is_first_process() else nullcontext():
        return _train(recipe, resume=resume, quiet=quiet)


def _train(recipe: Recipe, *, resume: bool, quiet: bool) -> RunResult:
    """Do what `train` says, in an output folder that no other run writes to."""
    checkpoint = open_output(recipe, resume=resume)
    planned = adapter_config(recipe)
    if recipe.method.name == "lorahub":
        check_lorahub(recipe)
    require_trackers(recipe.train.report_to)
    require_engine(recipe)
    check_course(recipe)
    load_rewards(recipe)  # a function that cannot be imported is refused before the work
    set_seed(recipe.seed)
    quiet = quiet or not is_first_process()
    seconds: dict[str, float] = {}
    with disk_guard(recipe.output), quiet_libraries():
        tokenizer = load_tokenizer(recipe.model)
        taken = getattr(planned, "num_virtual_tokens", None) or 0
        examples = encode_tasks(recipe, tokenizer, load_config(recipe.model), taken=taken)
        if recipe.init_from is not None:
            check_earlier(adapted_on_meta(recipe), recipe)  # refused before the work
        fingerprints = _fingerprints(examples)
        if checkpoint is not None:
            check_data(recipe.output, fingerprints)
        for note in examples.notes:
            log.warning(note)
        base = load_model(recipe.model, weights_of(recipe))
        if not is_sharded():  # else it may not fit; training spreads it
            base.to(own_device())
        if recipe.train.packing:
            require_separate_examples(base)
        before: Results | None = None
        if recipe.evaluate.before and not is_sharded():
            adapted_on_meta(recipe)  # an adapter that the model does not take is refused before the work
            with _timed(seconds, "evaluate_before"):
                before = _score(base, tokenizer, recipe, quiet=quiet)
        numbers = parameter_counts(base)[1]
        model = add_adapter(base, recipe)
        earlier = start_from(model, recipe)
        if earlier is not None:
            log.log(logging.WARNING if earlier.other_base else logging.INFO, "%s", earlier.words())
        about_model = notes_on(model, recipe)
        for note in about_model:
            log.warning(note)
        start = start_of(model)
        if recipe.method.name != "lorahub" and not is_sharded():  # which trains and saves adapters of its own
            check_saving(model, start)
        trainable, total = parameter_counts(model)
        parameters = {"trainable": trainable, "total": total}
        log.info(
            "%s trains %s of %s parameters (%.2f%%)",
            recipe.method.name,
            f"{trainable:,}",
            f"{total:,}",
            100 * trainable / total,
        )
        figures: dict[str, Any] = {}
        pauses: list[float] = []
        with _timed(seconds, "train"):
            if recipe.method.name == "lorahub":
                report, history, made = fit_and_compose(model, tokenizer, recipe, examples, quiet=quiet)
                figures = {"composition": made.to_dict()}
            else:
                data, history = fit(
                    model,
                    tokenizer,
                    recipe,
                    examples,
                    checkpoint=checkpoint,
                    fingerprints=fingerprints,
                    quiet=quiet,
                    score=lambda model: _score(model, tokenizer, recipe, quiet=True),
                    validate=lambda model: _validate(model, tokenizer, recipe),
                    best=_keeper(recipe),
                    paused=pauses.append,
                )
                report = data.report
                figures = _on_the_way(recipe, examples, history)
        if pauses:
            seconds["train"] -= sum(pauses)
            seconds["evaluate_during"] = sum(pauses)
        save_adapter(model, recipe.output, start=start)
        if is_first_process():
            write_text(recipe.output / "recipe.yaml", without_secrets(recipe.to_yaml(recipe.output)))
            if "composition" in figures:
                write_json(recipe.output / "composition.json", figures["composition"])
            if not isinstance(model, PeftModel):
                tokenizer.save_pretrained(recipe.output)  # a whole model needs its own
        if is_sharded() and recipe.evaluate.before and isinstance(model, PeftModel) and start is None:
            # only now is the base model there; all processes must join in
            with _timed(seconds, "evaluate_before"), model.disable_adapter():
                before = _score(model, tokenizer, recipe, quiet=quiet)
        if not is_first_process() and not is_sharded():  # one process scores; the others' adapters are the same
            return RunResult(output=recipe.output, results={"base": before, "mixture": report}, log=history)
        otherwise = is_saved_otherwise(model)
        if (otherwise or isinstance(model, PeftModel)) and not is_sharded():  # score what others will load
            trained = probe(model) if isinstance(model, PeftModel) else None
            del model, base
            model = load_target(recipe.output).model
            if trained is not None:
                check_answers(trained, probe(model), recipe.output, exact=not otherwise)
        if METHODS[recipe.method.name].trains == "factors":
            parameters |= {"base": numbers, "saved": parameter_counts(model)[1]}
        with _timed(seconds, "evaluate_after"):
            place = recipe.output if is_first_process() else None
            after = _score(model, tokenizer, recipe, folder=place, quiet=quiet)
        if not is_first_process():
            return RunResult(output=recipe.output, results={"base": before, "mixture": report}, log=history)
        results = write_artifact(
            recipe.output,
            recipe,
            base=before,
            adapted=after,
            mixture=report,
            parameters=parameters,
            training={
                "log": _without_times(history),
                **({} if earlier is None else {"init_from": earlier.to_dict()}),
                **figures,
            },
            fingerprints=fingerprints,
            seconds=seconds,
            notes=(*about_model, *examples.notes),
        )
    return RunResult(output=recipe.output, results=results, log=history)


def _fingerprints(examples: Examples) -> dict[str, dict[str, Any]]:
    """Of every task's rows; rows that a comparison has kept are the same object, and have theirs already."""
    return {name: once(("fingerprint", id(rows)), partial(fingerprint, rows)) for name, rows in examples.rows.items()}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage took."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _without_times(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Keep of the log what the seed determines: the step, the objective's figures, the learning rate, the routers'."""
    kept = ("step", "epoch", "learning_rate", "grad_norm")
    kinds = ("loss", "routing", "reward", "length", "cut", "equal", "kl", "accuracy", "margin")
    return [
        {key: value for key, value in line.items() if key in kept or key.partition("/")[0] in kinds}
        for line in history
        if "loss" in line
    ]


def _keeper(recipe: Recipe) -> KeepBest | None:
    """What keeps the best adapter, where the recipe asks for it."""
    wanted = recipe.evaluate
    if wanted.keep_best is None:
        return None
    return KeepBest(partial(goodness, by=wanted.keep_best), wanted.early_stopping_patience)


def _on_the_way(recipe: Recipe, examples: Examples, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What the log says about scores on the way: the course, the validation scores, the best of them, an early end."""
    course, validation, by = course_of(history), validation_of(history), recipe.evaluate.keep_best
    found: dict[str, Any] = ({"course": course} if course else {}) | ({"validation": validation} if validation else {})
    if by is None:
        return found
    best = validation[best_of(validation, partial(goodness, by=by))]
    found["best"] = {"step": best["step"], "by": by, "score": deciding_score(best["scores"], by)}
    planned, done = steps_of(recipe, examples.mixture.epoch_size, num_processes())[0], validation[-1]["step"]
    log.info("The adapter of step %d is kept, the best of %d by its validation scores", best["step"], len(validation))
    return found | ({"steps": done, "planned_steps": planned} if done < planned else {})


def _score(model: Any, tokenizer: Any, recipe: Recipe, *, folder: Path | None = None, quiet: bool) -> Results:
    """Score a model on the recipe's tasks, as the recipe says.

    Only with a ``folder`` is anything written: a run leaves its output folder empty until there is an adapter or a
    checkpoint to keep, so that one that failed early can simply be started again.
    """
    wanted = recipe.evaluate
    return _evaluate(
        model,
        tokenizer,
        recipe,
        split=wanted.split,
        extra_tasks=wanted.extra_tasks,
        harness_tasks=wanted.harness_tasks,
        folder=folder,
        progress=not quiet,
    )


def _validate(model: Any, tokenizer: Any, recipe: Recipe) -> Results:
    """Score a model on validation rows of the trained tasks: what is decided by them must not have seen test rows."""
    return _evaluate(model, tokenizer, recipe, split="validation", progress=False)


def _evaluate(model: Any, tokenizer: Any, recipe: Recipe, **words: Any) -> Results:
    wanted = recipe.evaluate
    return evaluate(
        model,
        tokenizer,
        recipe.tasks,
        limit=wanted.limit,
        batch_size=wanted.batch_size,
        max_new_tokens=wanted.max_new_tokens,
        chat_template=recipe.model.chat_template,
        **words,
    )
