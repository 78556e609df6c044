"""Score a model on tasks: the whole of an evaluation. The scores are lm-evaluation-harness's."""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from multiflora.errors import ConfigError, DataError, EnvironmentProblem
from multiflora.evaluation.harness import metric_of, row_of, to_harness
from multiflora.evaluation.results import (
    Group,
    Results,
    TaskScore,
    example_scores,
    harness_example_scores,
    macro_average,
    macro_stderr,
    main_metric,
    mean_nll,
    task_score,
)
from multiflora.evaluation.screen import Bar, quiet, restored
from multiflora.files import write_text
from multiflora.recipe import EvaluateSpec
from multiflora.suggest import nearest
from multiflora.tasks import Example, TaskSpec, as_text, load_task
from multiflora.tasks.chat import ahead, around_answer
from multiflora.tasks.load import examples_of
from multiflora.tasks.shots import with_shots

if TYPE_CHECKING:
    from multiflora.evaluation.model import HarnessModel

__all__ = ["evaluate"]

log = logging.getLogger(__name__)

# the harness's own seed for the few-shot examples of its tasks, and the one its rows are drawn by
_FEWSHOT_SEED = 1234
# the harness resamples 100,000 times for metrics without a formula, which takes minutes for F1; the error of an error
# bar after 1,000 is 2 %
_BOOTSTRAPS = 1000


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to score, every default filled in."""

    tasks: Sequence[TaskSpec]
    extra_tasks: Sequence[TaskSpec]
    harness_tasks: Sequence[str]
    split: Literal["test", "validation"]
    limit: int | None
    batch_size: int
    max_new_tokens: int
    chat_template: bool


def evaluate(
    model: Any,
    tokenizer: Any = None,
    tasks: Iterable[TaskSpec | str | Path | Mapping[str, Any]] | None = None,
    *,
    extra_tasks: Sequence[TaskSpec] = (),
    harness_tasks: Sequence[str] = (),
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    chat_template: bool | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> Results:
    """Score a model on tasks.

    Where ``model`` is a run's folder, what is left out comes from its recipe (tasks, split, batch size, answer length
    and chat template, but not the limit); else from a recipe's defaults.

    Args:
        model: A causal language model in memory, with an adapter or without; or a run's output folder; or a model's
            folder, hub id or ``embedded``.
        tokenizer: The tokenizer of a model in memory.
        tasks: Shipped names, task files, folders of files, mappings or TaskSpecs.
        extra_tasks: Scored too, and left out of the macro average: tasks that were not trained on.
        harness_tasks: Tasks of lm-evaluation-harness by their names there, scored as it defines them.
        split: ``test`` or ``validation``.
        limit: At most this many examples of each task, a seeded sample; None: all.
        batch_size: Rows of a forward pass.
        max_new_tokens: Longest generated answer, in tokens, where a task does not say.
        chat_template: Put prompts through the tokenizer's chat template.
        folder: Our tasks are written for the harness to ``folder/harness``, where it can be run on them alone, and each
            example's score to ``folder/scores`` (of the harness's own tasks to ``folder/scores/harness``); None: a
            temporary folder.
        progress: Show a progress bar on stderr, and log how long each task took.

    Returns:
        Score, examples and standard error of each task, and the mean of the scores.

    Raises:
        ConfigError: No tasks, or an unknown one, or a setting that the model cannot meet.
        DataError: A task has no examples in that split, or they cannot be scored.
        EnvironmentProblem: A task of the harness needs data that cannot be had.

    Example:
        >>> evaluate("embedded", tasks=["boolq"], limit=100)["macro"]  # doctest: +SKIP
        0.41
    """
    recipe = None
    if isinstance(model, str | Path):
        from multiflora.evaluation.load import load_target

        model, loaded_tokenizer, recipe = load_target(model)
        tokenizer = tokenizer or loaded_tokenizer
    elif tokenizer is None:
        raise ConfigError("evaluate() got a model in memory but no tokenizer; expected both, or a folder or hub id.")
    spec = EvaluateSpec() if recipe is None else recipe.evaluate
    if tasks is None and recipe is not None:
        tasks, extra_tasks, harness_tasks = recipe.tasks, spec.extra_tasks, spec.harness_tasks
    by_name = {} if recipe is None else {t.name: t for t in (*recipe.tasks, *spec.extra_tasks)}
    plan = _Plan(
        # a name is the run's own task before it is a shipped one
        tasks=[
            by_name.get(task) or load_task(task) if isinstance(task, str) else load_task(task) for task in tasks or ()
        ],
        extra_tasks=extra_tasks,
        harness_tasks=harness_tasks,
        split=_checked_split(split or spec.split),
        limit=limit,
        batch_size=batch_size or spec.batch_size,
        max_new_tokens=max_new_tokens or spec.max_new_tokens,
        chat_template=(recipe is not None and recipe.model.chat_template) if chat_template is None else chat_template,
    )
    if not plan.tasks and not plan.extra_tasks and not plan.harness_tasks:
        raise ConfigError("There are no tasks to score; expected some, e.g. tasks=['boolq'] or --tasks boolq.")
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(restored(model))
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        return _score(plan, model, tokenizer, place / "harness", stack.enter_context(Bar(progress)))


def _checked_split(split: str) -> Literal["test", "validation"]:
    """Return the split if it is one that is scored."""
    if split == "test":
        return "test"
    if split == "validation":
        return "validation"
    raise ConfigError(f"split is {split!r}; expected test or validation.")


def _score(plan: _Plan, model: Any, tokenizer: Any, folder: Path, bar: Bar) -> Results:
    """Write all our tasks for the harness, then let it score one after the other."""
    from lm_eval.tasks import TaskManager

    from multiflora.evaluation.model import HarnessModel

    lm = HarnessModel(model, tokenizer, plan.batch_size, bar.show)
    if plan.chat_template and plan.harness_tasks:
        as_text(Example("", "", "a question", "an answer"), tokenizer, True)  # refuses a tokenizer without a template
    theirs = {name: _their_task(name) for name in plan.harness_tasks}
    groups: list[tuple[Group, Sequence[TaskSpec]]] = [("tasks", plan.tasks), ("extra", plan.extra_tasks)]
    lm.templated = plan.chat_template
    ours = [(group, spec, *_written(spec, plan, lm, folder)) for group, specs in groups for spec in specs]
    scores: dict[str, TaskScore] = {}
    folder.mkdir(parents=True, exist_ok=True)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for group, spec, count, too_long in ours:
        lm.stops = tuple(stop for stop in spec.stop if not stop.strip())  # the others are in the task's own file
        found = _run(lm, manager.load([spec.name]), spec.name, bar)
        samples = found["samples"][spec.name]
        nll = mean_nll(samples) if spec.score == "choices" else None
        _write_rows(folder.parent / "scores" / f"{spec.name}.jsonl", example_scores(samples, metric_of(spec)))
        scores[spec.name] = task_score(found["results"][spec.name], metric_of(spec), n=count, nll=nll, group=group)
        if too_long:
            scores[spec.name]["left_out"] = too_long
    lm.stops, lm.templated = (), None
    for name, loaded in theirs.items():
        found = _run(lm, loaded, name, bar, limit=plan.limit, chat_template=plan.chat_template)
        # a group has a score of its own; a tag is only a list of tasks
        for key in [name] if name in found["results"] else list(loaded["tasks"]):
            leaves = [key] if key in loaded["tasks"] else list(loaded["tasks"])
            samples = {leaf: found["samples"][leaf] for leaf in leaves}
            count = sum(len({sample["doc_id"] for sample in own}) for own in samples.values())
            entry = found["results"][key]
            score = task_score(entry, main_metric(entry), n=count, group="harness")
            scores[f"harness/{key}"] = score
            rows = harness_example_scores(samples, score)
            if rows is not None:
                _write_rows(folder.parent / "scores" / "harness" / f"{quote(key, safe='')}.jsonl", rows)
    return Results(tasks=scores, macro=macro_average(scores), macro_stderr=macro_stderr(scores))


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one line for each example: what a paired comparison of two models reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, allow_nan=True) + "\n" for row in rows))


def _written(spec: TaskSpec, plan: _Plan, lm: HarnessModel, folder: Path) -> tuple[int, int]:
    """Write a task's examples for the harness; return how many there are, and how many were left out as too long."""
    chat, tokenizer = plan.chat_template, lm.tokenizer
    examples = with_shots(spec, examples_of(spec, plan.split, plan.limit))
    # where nats are the score, the end of text counts as it does in training
    end = (tokenizer.eos_token or "") if spec.score == "nll" else ""

    def texts(example: Example) -> tuple[str, str]:
        prompt, completion = as_text(example, tokenizer, chat)
        return prompt, completion + end

    is_generated = spec.score not in ("choices", "nll")
    new_tokens = (spec.max_new_tokens or plan.max_new_tokens) if is_generated else None
    rows = [
        row_of(example, texts, around_answer(example, tokenizer, chat) if is_generated else ("", ""))
        for example in ahead(examples, tokenizer, chat)
    ]
    lm.read_ahead(rows)
    for row in rows:
        row["tokens"] = lm.count_tokens(row["prompt"], row["completion"])
    kept = [row for row in rows if not lm.left_out(row, new_tokens)]
    too_long = len(rows) - len(kept)
    told = f" with the {new_tokens:,} tokens of an answer" if new_tokens else ""
    if not kept:
        raise DataError(
            f"task {spec.name}: none of its {len(rows):,} {plan.split} examples{told} fits into the model's context of "
            f"{lm.max_length:,} tokens. Take a model with a longer one, shorter texts"
            f"{', or a smaller evaluate.max_new_tokens' if new_tokens else ''}."
        )
    if too_long:
        log.warning(
            "%s: %d of %d %s examples%s are longer than the model's context of %d tokens; its score is without them.",
            spec.name,
            too_long,
            len(rows),
            plan.split,
            told,
            lm.max_length,
        )
    to_harness(spec, kept, folder, max_new_tokens=plan.max_new_tokens)
    return len(kept), too_long


def _run(
    lm: HarnessModel, loaded: Any, name: str, bar: Bar, limit: int | None = None, *, chat_template: bool = False
) -> Any:
    """Let the harness score loaded tasks, with the adapter told which task it is.

    Args:
        lm: The model.
        loaded: The tasks.
        name: What was asked for.
        bar: Shows how far it is.
        limit: At most this many examples of each, a seeded sample; None: all.
        chat_template: Let the harness write its prompts through the tokenizer's chat template.
    """
    from lm_eval import evaluator

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    bar.begin(name)
    start = time.perf_counter()
    drawn = {leaf: _drawn(leaf, len(task.eval_docs), limit) for leaf, task in loaded["tasks"].items()}
    with _routed(lm.model, name):
        found = evaluator.evaluate(
            lm,
            loaded,
            samples=None if limit is None else drawn,
            bootstrap_iters=_BOOTSTRAPS,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    # a scoring that shows nothing, as on the way through a training, is told of by whoever asked for it
    log.log(logging.INFO if bar.is_shown else logging.DEBUG, "%s scored in %.0f s", name, time.perf_counter() - start)
    return found


def _drawn(name: str, size: int, limit: int | None) -> list[int]:
    """Draw rows of a task of the harness: a prefix of one shuffle, so a smaller limit is a subset of a larger one.

    Its first rows would not do: the data of many tasks are sorted by subject or by label.
    """
    return sorted(random.Random(f"{_FEWSHOT_SEED} {name}").sample(range(size), size)[:limit])


def _routed(model: Any, name: str) -> AbstractContextManager[None]:
    """Tell an adapter that knows this task by name which one it is; others are left as they are."""
    from multiflora.context import configs_of, task

    configs = configs_of(model).values()
    return task(model, name) if configs and all(name in (c.task_names or ()) for c in configs) else nullcontext()


@cache
def _their_manager() -> Any:
    """Index all tasks of the harness, which takes about ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _their_task(name: str) -> Any:
    """Load a task of the harness and its data, before anything is scored."""
    manager = _their_manager()
    if name not in manager.all_tasks:
        guess = nearest(name, manager.all_tasks)  # its names are thousands: too many to list
        raise ConfigError(
            f"evaluate.harness_tasks names {name!r}, which lm-evaluation-harness does not have"
            f"{f'; did you mean {guess}?' if guess else '.'} `lm_eval ls tasks` lists them."
        )
    try:
        return manager.load([name])
    except (OSError, ImportError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise EnvironmentProblem(
            f"evaluate.harness_tasks: the harness cannot load its task {name!r}: {why}. Its data come from the hub; "
            "check the network, or leave the task out."
        ) from error
