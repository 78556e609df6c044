import pytest
from pydantic import ValidationError

from multiflora.errors import ConfigError
from multiflora.tasks import FilesSource, GeneratorSource, HubSource, load_task

HUB = {"path": "org/data"}


def task(**keys):
    return load_task({"name": "t", "source": HUB, "prompt": "{{ q }}", "completion": " {{ a }}", **keys})


def refused(**keys) -> str:
    with pytest.raises(ConfigError, match="task t") as caught:
        task(**keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ({"path": "org/data", "name": "main"}, HubSource),
        ({"train": "a.jsonl", "test": ["b.csv", "c/*.parquet"]}, FilesSource),
        ({"folder": "rows"}, FilesSource),
        ("rows", FilesSource),
        ("rows.csv", FilesSource),
        ({"generator": "chain_sum", "settings": {"max_terms": 2}}, GeneratorSource),
    ],
)
def test_a_source_is_told_by_its_keys(source, kind, tmp_path):
    spec = load_task({"name": "t", "source": source, "prompt": "p", "completion": " c"}, base=tmp_path)
    assert type(spec.source) is kind


def test_paths_are_relative_to_the_base_and_a_configuration_may_be_one_word(tmp_path):
    spec = load_task(
        {"name": "t", "source": {"train": "../a.jsonl", "test": "b/*.csv"}, "prompt": "p", "completion": " c"}, tmp_path
    )
    assert spec.source.train == (tmp_path.parent / "a.jsonl",)
    assert spec.source.test == (tmp_path / "b" / "*.csv",)
    assert task(source={"path": "org/data", "name": "main"}).source.name == ("main",)


@pytest.mark.parametrize(
    ("keys", "score", "stop"),
    [
        ({}, "nll", ()),
        ({"answer": "a"}, "exact", ("\n",)),
        ({"score": "number", "answer": "a"}, "number", ("\n\n",)),
        ({"choices": [" yes", " no"], "completion": None}, "choices", ()),
        ({"source": {"generator": "gcd"}}, "verifier", ("\n",)),
        ({"score": "exact", "stop": "END"}, "exact", ("END",)),
    ],
)
def test_score_and_stop_follow_from_the_other_keys(keys, score, stop):
    spec = task(**keys)
    assert (spec.score, spec.stop) == (score, stop)


def test_a_generator_needs_no_template():
    spec = load_task({"name": "t", "source": {"generator": "gcd"}})
    assert (spec.prompt, spec.completion) == ("{{ question }}\nAnswer:", " {{ answer }}")


def test_names_are_fit_for_files_and_logs():
    for name in ("a/b", "", "-a", "a b"):
        with pytest.raises(ConfigError, match="name"):
            load_task({"name": name, "source": HUB, "prompt": "p", "completion": " c"})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"promt": "x"}, "promt is not a known key; did you mean prompt?"),
        ({"weight": -1}, "weight is -1; expected greater than 0"),
        ({"score": "exat"}, "score is 'exat'; did you mean exact?"),
        ({"messages": "turns"}, "give either 'prompt' or 'messages', not both"),
        ({"score": "choices"}, "score is 'choices' and choices is None"),
        ({"score": "exact", "choices": [" a", " b"]}, "score is 'exact' and choices is"),
        ({"score": "verifier"}, "score 'verifier' needs a reasoning-gym source"),
        ({"completion": None}, "'completion' is missing"),
        ({"source": {"generator": "gcd"}, "id": "question"}, "'id' is for rows that have one"),
        ({"prompt": "{{ q"}, "prompt: not a Jinja template: unexpected end of template"),
        ({"prompt": "{{ q | shuot }}"}, "prompt: not a Jinja template: No filter named 'shuot'"),
        ({"answer": "{{ a }}"}, "answer: not a Jinja expression"),
        ({"choices": ["{{ a"], "completion": None}, "choices: not a Jinja template"),
        (
            {"messages": [{"role": "user", "content": "{% if %}"}], "prompt": None},
            "messages.0.content: not a Jinja template",
        ),
        ({"source": {}}, "a source of files names either 'folder' or some of"),
        ({"source": {"folder": "a", "train": "b"}}, "a source of files names either 'folder' or some of"),
        ({"source": {"path": "a/b", "splits": {"dev": "x"}}}, "source.splits.dev"),
        ({"source": {"generator": "gcd", "sizes": {"train": -1}}}, "train is -1 rows; expected 0 to 1,000,000"),
        ({"split_sizes": {"test": 0}}, "split_sizes.test is 0; expected greater than 0"),
        ({"split_from": "dev"}, "split_from is 'dev'; known: test, train, validation."),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected greater than 0"),
    ],
)
def test_a_task_that_cannot_work_is_refused_with_its_key(keys, told):
    assert told in refused(**keys)


def test_a_spec_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        task().weight = 2
