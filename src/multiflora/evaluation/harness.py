"""Our tasks as tasks of lm-evaluation-harness: one YAML and one JSONL each, which the harness runs as they stand.

    lm_eval --model hf --model_args pretrained=BASE,peft=RUN --include_path RUN/harness --tasks NAME

The folder can be moved: nothing in it names its own place. Multiple choice needs the harness alone; the other scores
are our functions, reached through a short ``utils.py`` beside the YAML.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from multiflora.evaluation.metrics import rouge_l
from multiflora.files import write_text
from multiflora.tasks.chat import answer_in
from multiflora.tasks.example import Example, answered
from multiflora.tasks.score import before_stop, reference_of, verify
from multiflora.tasks.spec import GeneratorSource, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["METRICS", "metric_of", "read_rows", "row_of", "score_nll", "score_text", "specs_in", "to_harness"]

METRICS = {
    "choices": "acc",
    "exact": "exact_match",
    "number": "number_match",
    "rouge": "rougeL",
    "verifier": "verifier",
    "nll": "nll",
}
"""Our score -> its name in the harness and in the results; a length-normalised choice is ``acc_bytes``."""

_UTILS = '''\
"""What the YAML files beside this one call; needs the package multiflora."""

from pathlib import Path

from multiflora.evaluation.harness import read_rows, score_nll, score_text, specs_in

FOLDER = Path(__file__).resolve().parent
SPECS = specs_in(FOLDER)


def rows(file, **_):
    """Give the harness a task's examples."""
    return {"test": read_rows(FOLDER / file)}


def text(doc, results):
    """Score one generated answer."""
    return score_text(SPECS[doc["task"]], doc, results[0])


def nll(doc, results):
    """Score one completion in nats per token."""
    return score_nll(doc, results[0])
'''


def metric_of(spec: TaskSpec) -> str:
    """Name the metric that is the task's score."""
    return "acc_bytes" if spec.score == "choices" and spec.length_normalised else METRICS[spec.score]


def row_of(
    example: Example,
    texts: Callable[[Example], tuple[str, str]],
    around: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """Return the JSONL row of an example.

    Args:
        example: The rendered example.
        texts: Gives the prompt and completion as the model reads them (through its chat template, perhaps).
        around: What a chat template writes before and behind an answer that is generated.
    """
    prompt, completion = texts(example)
    row: dict[str, Any] = {"task": example.task, "id": example.id, "prompt": prompt, "completion": completion}
    if example.choices:
        row["choices"] = [texts(answered(example, choice))[1] for choice in example.choices]
    if example.answer is not None:
        row["answer"] = example.answer
    if any(around):
        row["around"] = list(around)
    return row


def to_harness(spec: TaskSpec, rows: Sequence[Mapping[str, Any]], folder: Path, *, max_new_tokens: int) -> Path:
    """Write a task for the harness.

    Args:
        spec: The task.
        rows: Its examples, from `row_of`.
        folder: Where ``NAME.yaml``, ``NAME.jsonl`` and what they share are written.
        max_new_tokens: Longest generated answer, where the task itself does not say.

    Returns:
        The YAML file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / f"{spec.name}.jsonl", lines)
    write_text(folder / "utils.py", _UTILS)
    specs_file = folder / "specs.json"
    specs = json.loads(specs_file.read_text("utf-8")) if specs_file.exists() else {}
    specs[spec.name] = _what_scoring_needs(spec)
    write_text(specs_file, json.dumps(specs, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    path = folder / f"{spec.name}.yaml"
    write_text(path, _yaml(spec, max_new_tokens, _until(spec, rows)))
    return path


def _until(spec: TaskSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where generation ends: at the task's stops, but not in a think block before the answer, and with the turn."""
    around = [row["around"] for row in rows if "around" in row]
    closing = dict.fromkeys(behind.strip() for _, behind in around if behind.strip())
    # a stop of white space ends an answer, not the white space before one, which the harness cannot tell apart
    own = [stop for stop in spec.stop if stop.strip()]
    return [*(() if any(before.strip() for before, _ in around) else own), *closing]


def _yaml(spec: TaskSpec, max_new_tokens: int, until: Sequence[str]) -> str:
    """Write the harness's config of a task."""
    # columns are named, not templated: the harness would render a Jinja text anew, and read digits as a number
    config: dict[str, Any] = {
        "task": spec.name,
        "dataset_kwargs": {"file": f"{spec.name}.jsonl"},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    functions = {"custom_dataset": "utils.rows"}
    names = [metric_of(spec)]
    if spec.score == "choices":
        names = list(dict.fromkeys([metric_of(spec), "acc", "acc_norm"]))
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    elif spec.score == "nll":
        config |= {"output_type": "loglikelihood", "doc_to_target": "completion"}
        functions["process_results"] = "utils.nll"
    else:
        limit = spec.max_new_tokens or max_new_tokens
        config |= {"output_type": "generate_until", "doc_to_target": "completion"}
        config["generation_kwargs"] = {"until": list(until), "max_gen_toks": limit, "do_sample": False}
        functions["process_results"] = "utils.text"
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": name != "nll"} for name in names
    ]
    plain = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return plain + "".join(f"{key}: !function {name}\n" for key, name in functions.items())


def _what_scoring_needs(spec: TaskSpec) -> dict[str, Any]:
    """The task without its data's place and its templates: what is left is enough to score an answer."""
    kept = spec.model_dump(mode="json", include={"name", "score", "stop", "length_normalised"})
    if isinstance(spec.source, GeneratorSource):  # a verifier makes the row again
        return {**kept, "source": spec.source.model_dump(mode="json")}
    kept["choices"] = "choices" if spec.score == "choices" else None
    return {**kept, "source": {"test": f"{spec.name}.jsonl"}}


def specs_in(folder: Path) -> dict[str, TaskSpec]:
    """Read the tasks that were written to a harness folder, by name; they can score and no more."""
    read = json.loads((folder / "specs.json").read_text("utf-8"))
    return {name: TaskSpec.model_validate(value, context={"base": folder}) for name, value in read.items()}


def read_rows(path: Path) -> Dataset:
    """Read a task's JSONL into memory; the harness's own loader would keep a copy in the user's cache."""
    from datasets import Dataset

    with path.open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])


def score_text(spec: TaskSpec, doc: Mapping[str, Any], text: str) -> dict[str, float]:
    """Score one generated answer by the task's own rule.

    Args:
        spec: The task; exact, number, verifier or rouge.
        doc: The row that was answered.
        text: What the model wrote, up to the first stop.
    """
    around = tuple(doc.get("around") or ("", ""))
    text = answer_in(text, (around[0], around[1]))
    reference = answer_in(doc["completion"], (around[0], around[1]))
    example = Example(spec.name, doc["id"], doc["prompt"], reference, answer=doc.get("answer"))
    if spec.score == "rouge":
        score = rouge_l(reference_of(example), before_stop(text, spec.stop).strip())
    else:
        score = verify(spec, example, text)
    return {METRICS[spec.score]: score}


def score_nll(doc: Mapping[str, Any], answer: tuple[float, bool]) -> dict[str, float]:
    """Turn a completion's log-likelihood into nats per token.

    Args:
        doc: The row; its column ``tokens`` counts the completion's tokens.
        answer: The harness's answer: log-likelihood in nats, and whether greedy decoding would give it.
    """
    return {"nll": -answer[0] / doc["tokens"]}
