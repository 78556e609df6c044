import re

import pytest

from multiflora.tasks import GeneratorSource, HubSource, load_task, render, shipped_tasks
from multiflora.tasks.load import examples_of
from multiflora.tasks.render import keeps
from multiflora.tasks.score import reference_of, verify

WANTED = [
    "alpaca",
    "dolly",
    "codealpaca",
    "mmlu",
    "gsm8k",
    "boolq",
    "cb",
    "copa",
    "multirc",
    "rte",
    "wic",
    "wsc",
    "sst2",
    "cola",
    "mrpc",
    "qqp",
    "mnli",
    "qnli",
    "piqa",
    "siqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "humaneval",
    "bbh",
    "flan",
    "lawyer_instruct",
    "us_terms",
    "genmedgpt",
    "mmlu_law",
    "mmlu_medical",
]
NAMES = list(shipped_tasks())
GENERATORS = [name for name in NAMES if name.startswith("rg_")]


def samples(name):
    """Rendered sample rows, and how many were left out."""
    shipped = shipped_tasks()[name]
    rows = [(f"{name}, sample {i}", row) for i, row in enumerate(shipped.sample_rows)]
    kept = [render(shipped.spec, row, where) for where, row in rows if keeps(shipped.spec, row, where)]
    return kept, len(rows) - len(kept)


def test_every_task_of_the_papers_and_at_least_six_generators_are_shipped():
    assert set(WANTED) <= set(NAMES)
    assert len(GENERATORS) >= 6
    assert set(NAMES) == {*WANTED, *GENERATORS}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_task_renders_its_sample_rows(name):
    shipped = shipped_tasks()[name]
    assert shipped.spec.name == name
    assert shipped.spec.about
    assert shipped.spec.licence
    assert len(shipped.sample_rows) == 3
    kept, _ = samples(name)
    assert len(kept) >= 2
    for example in kept:
        assert example.completion[0] in " \n", "a completion brings its own space"
        assert example.completion[1:2] != " " or name == "humaneval"
        assert not example.prompt.endswith(" "), "a prompt that ends in a space breaks the tokens of the completion"
        assert "{" not in example.prompt or name in {"bbh", "humaneval"}
        assert not re.search(r"\bNone\b|\[\w+\]", example.prompt.replace("[blank]", "")) or name.startswith("rg_")
        if shipped.spec.score == "choices":
            assert example.completion == example.choices[example.answer]
            assert all(choice.startswith(" ") for choice in example.choices)
        else:
            assert not example.choices


@pytest.mark.parametrize("name", NAMES)
def test_every_template_reads_columns_of_the_samples_only(name):
    # the rows of one data set have the same columns
    columns = {tuple(row) for row in shipped_tasks()[name].sample_rows}
    assert len(columns) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_answer_scores_one(name):
    spec = shipped_tasks()[name].spec
    if spec.score in {"exact", "number"}:
        for example in samples(name)[0]:
            assert verify(spec, example, example.completion) == 1.0
            assert reference_of(example)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("winogrande", [0, 1]),
        ("siqa", [0, 1, 2]),
        ("arc_easy", [0, 2, 1]),
        ("openbookqa", [1, 0, 2]),
        ("hellaswag", [0, 1]),
        ("rte", [0, 1]),
        ("qnli", [0, 1]),
        ("mnli", [0, 1, 2]),
        ("mmlu", [1, 2, 3]),
        ("gsm8k", ["15", "10", "1,250"]),
    ],
)
def test_labels_are_read_as_the_data_set_means_them(name, answers):
    assert [example.answer for example in samples(name)[0]] == answers


@pytest.mark.parametrize("name", ["alpaca", "boolq", "sst2", "qnli", "rte", "qqp", "winogrande", "hellaswag"])
def test_unlabelled_and_empty_rows_are_left_out(name):
    assert samples(name)[1] == 1


def test_the_data_mistakes_of_the_published_code_are_not_made():
    glue = [t.spec for t in (shipped_tasks()[n] for n in ("sst2", "cola", "mrpc", "qqp", "mnli", "qnli"))]
    superglue = [shipped_tasks()[n].spec for n in ("boolq", "cb", "copa", "multirc", "rte", "wic", "wsc")]
    for spec in (*glue, *superglue):
        assert "test" not in spec.source.splits.values(), "their official test has no labels"
        assert spec.keep.startswith("label >= 0")
        assert spec.source.splits["train"] == "train"
    assert shipped_tasks()["winogrande"].spec.source.name == ("winogrande_xl",)
    assert shipped_tasks()["bbh"].spec.stop == ("\n",)
    assert len(shipped_tasks()["bbh"].spec.source.name) == 27


def test_the_calculator_marks_of_gsm8k_and_the_tags_of_hellaswag_are_gone():
    for name in ("gsm8k", "hellaswag"):
        for example in samples(name)[0]:
            assert "<<" not in example.completion
            assert not re.search(r"\[\w+\]", " ".join((example.prompt, *example.choices)))


def test_tasks_for_evaluation_only_have_no_training_split():
    for name in ("mmlu_law", "mmlu_medical", "humaneval", "bbh"):
        spec = shipped_tasks()[name].spec
        assert "train" not in spec.source.splits
        assert not spec.split_sizes


def test_no_shipped_data_set_needs_a_loading_script():
    # these repositories hold a script, which datasets refuses since version 4
    scripted = {
        "piqa",
        "ybisk/piqa",
        "social_i_qa",
        "allenai/social_i_qa",
        "lukaemon/bbh",
        "super_glue",
        "lexlms/legal_lama",
    }
    for shipped in shipped_tasks().values():
        assert isinstance(shipped.spec.source, HubSource | GeneratorSource)
        assert getattr(shipped.spec.source, "path", "") not in scripted


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_task_makes_real_rows_with_short_answers_that_its_verifier_accepts(name):
    spec = load_task(name)
    rows = examples_of(spec, "test", limit=20)
    real = shipped_tasks()[name].sample_rows
    assert len({e.prompt for e in rows}) > 15
    for example in rows:
        assert verify(spec, example, example.completion) == 1.0
        assert len(example.completion) <= 4 * spec.max_new_tokens
        assert len(example.prompt) < 500
    assert all(set(row) == {"question", "answer", "metadata"} for row in real)


def test_a_shipped_task_can_be_changed_by_naming_it():
    spec = load_task({"name": "gsm8k", "weight": 2, "max_new_tokens": 64})
    assert (spec.weight, spec.max_new_tokens, spec.score) == (2, 64, "number")
    assert spec.source == shipped_tasks()["gsm8k"].spec.source
