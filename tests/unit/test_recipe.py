import json
import subprocess
import sys
from pathlib import Path

import pytest

from multiflora.errors import ConfigError
from multiflora.recipe import Recipe, load_recipe, recipe_from

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "answer": str(i + 1), "id": f"r{i}"} for i in range(30)]


def write_rows(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "data" / "sums" / "train.jsonl")
    return tmp_path


def minimal(**changes):
    return {"model": "embedded", "method": "rlora", "tasks": ["gsm8k"], "output": "run", **changes}


def refused(recipe, overrides=()) -> str:
    with pytest.raises(ConfigError, match="recipe") as caught:
        recipe_from(recipe, overrides)
    return str(caught.value)


def test_ten_lines_are_a_recipe(folder):
    path = folder / "recipe.yaml"
    path.write_text(
        "model: embedded\n"
        "method: {name: rlora, r: 4, num_heads: 3}\n"
        "tasks:\n- gsm8k\n- data/sums\n- {name: mine, source: data/sums/train.jsonl, weight: 2}\n"
        "train: {learning_rate: 1e-3}\noutput: out\n"
    )
    recipe = load_recipe(path)
    assert recipe.model.name == "embedded"
    assert recipe.method.settings == {"target_modules": "all-linear", "r": 4, "num_heads": 3}
    assert [t.name for t in recipe.tasks] == ["gsm8k", "sums", "mine"]
    assert recipe.train.learning_rate == 1e-3
    assert recipe.output == folder / "out"
    assert recipe.tasks[1].source.folder == folder / "data" / "sums"
    assert recipe.tasks[2].source.train == (folder / "data" / "sums" / "train.jsonl",)
    assert recipe.task("mine").weight == 2


def test_a_written_recipe_reads_back_equal_here_and_elsewhere(folder):
    (folder / "model").mkdir()
    recipe = recipe_from(
        minimal(
            model=str(folder / "model"),
            method={"name": "rlora", "r": 8},
            tasks=["gsm8k", "hellaswag", "rg_chain_sum", str(folder / "data" / "sums")],
            evaluate={"extra_tasks": ["mmlu_law"], "limit": 5},
            mixture={"strategy": "capped", "cap": 100},
            train={"report_to": "tensorboard", "max_steps": 3},
            output=str(folder / "run"),
        )
    )
    (folder / "elsewhere").mkdir()
    for text, place in ((recipe.to_yaml(), "abs.yaml"), (recipe.to_yaml(folder / "elsewhere"), "elsewhere/rel.yaml")):
        (folder / place).write_text(text)
        assert load_recipe(folder / place) == recipe
    assert str(folder) not in recipe.to_yaml(folder / "elsewhere")


def test_an_empty_stop_list_survives_being_written(folder):
    task = {"name": "t", "source": {"path": "a/b"}, "prompt": "p", "completion": " c", "answer": "x", "stop": []}
    recipe = recipe_from(minimal(tasks=[task], output=str(folder)))
    (folder / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(folder / "r.yaml").tasks[0].stop == ()


def test_all_problems_come_at_once_each_with_its_key():
    told = refused(
        {
            "model": {"name": "x", "dtyp": "float32"},
            "method": "rlor",
            "tasks": ["gsm8", {"name": "b", "source": {"path": "x", "split": 1}, "weight": 0, "prompt": "{{ x"}],
            "train": {"learning_rat": 1, "batch_size": 0},
            "mixture": {"strategy": "weight"},
            "seed": -1,
        }
    )
    for problem in (
        "recipe has 11 problems",
        "model.dtyp is not a known key; did you mean dtype?",
        "method.name: 'rlor' is not a method; did you mean",
        "tasks.0: 'gsm8' is not a shipped task; did you mean gsm8k?",
        "tasks.1.source.split is not a known key; did you mean splits?",
        "tasks.1.prompt: not a Jinja template: unexpected end of template",
        "tasks.1.weight is 0; expected greater than 0",
        "mixture.strategy is 'weight'; did you mean weights?",
        "train.batch_size is 0; expected greater than 0",
        "train.learning_rat is not a known key; did you mean learning_rate?",
        "seed is -1; expected greater than or equal to 0",
        "output is missing; it is required",
    ):
        assert problem in told


@pytest.mark.parametrize("weight", [0, -0.5, float("nan"), float("inf")])
def test_a_weight_must_be_a_positive_number(weight):
    assert "tasks.0.weight is" in refused(minimal(tasks=[{"name": "gsm8k", "weight": weight}]))


def test_two_tasks_of_one_name_are_refused():
    assert "item 1 is named 'gsm8k', as is item 0; names must differ" in refused(minimal(tasks=["gsm8k", "gsm8k"]))


def test_a_task_that_is_trained_on_is_not_an_extra_task():
    told = refused(minimal(evaluate={"extra_tasks": ["gsm8k"]}))
    assert "evaluate.extra_tasks.0 (gsm8k) is trained on, and so scored already" in told
    told = refused(minimal(evaluate={"extra_tasks": ["rte", "rte"]}))
    assert "evaluate.extra_tasks.0 (rte) is there twice already" in told


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"keep_best": "macro"}, "evaluate: keep_best is 'macro', but nothing is scored on the way. Add every"),
        (
            {"every": 5, "early_stopping_patience": 2},
            "evaluate: early_stopping_patience is 2, but it is not said which",
        ),
        ({"every": 5, "keep_best": "wors"}, "evaluate.keep_best is 'wors'; did you mean worst?"),
    ],
)
def test_a_best_needs_scores_and_patience_a_best(evaluate, message):
    assert message in refused(minimal(evaluate=evaluate))


def test_no_task_at_all_is_refused():
    assert "tasks is []; expected" in refused(minimal(tasks=[]))


def test_a_missing_file_is_named_with_its_key_and_what_is_there(folder):
    told = refused(minimal(tasks=[{"name": "t", "source": str(folder / "data" / "sums" / "trian.jsonl")}]))
    assert "tasks.0: " in told
    assert "trian.jsonl does not exist; " in told
    assert "sums holds train.jsonl" in told


@pytest.mark.parametrize(("value", "found"), [(None, "empty"), ([1], "a list"), ("text", "a str")])
def test_a_recipe_file_that_is_no_mapping_is_refused(tmp_path, value, found):
    (tmp_path / "recipe.yaml").write_text(json.dumps(value) if value else "")
    with pytest.raises(ConfigError, match=f"recipe.yaml is {found}; expected a mapping with the keys model, method"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load_recipe(tmp_path / "nothing.yaml")


def test_overrides_reach_everything_and_create_what_is_not_there():
    recipe = recipe_from(
        minimal(),
        ["train.learning_rate=1e-4", "tasks.0.weight=3", "model.dtype=bfloat16", "method.r=2", "evaluate.limit=7"],
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.tasks[0].weight == 3
    assert (recipe.model.name, recipe.model.dtype) == ("embedded", "bfloat16")
    assert recipe.method.settings["r"] == 2
    assert recipe.evaluate.limit == 7


def test_overrides_of_a_recipe_that_is_already_resolved():
    recipe = recipe_from(recipe_from(minimal(tasks=["gsm8k", "rte"])), ["tasks.1.weight=2", "seed=5"])
    assert (recipe.tasks[1].name, recipe.tasks[1].weight, recipe.seed) == ("rte", 2, 5)


def test_an_override_reaches_into_a_task_given_as_a_path(folder):
    (folder / "r.yaml").write_text("model: embedded\nmethod: lora\ntasks: [data/sums]\noutput: o\n")
    (task,) = load_recipe(folder / "r.yaml", ["tasks.0.weight=4"]).tasks
    assert (task.name, task.weight, task.score) == ("sums", 4, "number")


def test_output_on_the_command_line_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("model: embedded\nmethod: lora\ntasks: [rte]\noutput: here\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/r.yaml").output == tmp_path / "recipes" / "here"
    assert load_recipe("recipes/r.yaml", ["output=there"]).output == tmp_path / "there"
    assert load_recipe("recipes/r.yaml").init_from is None
    assert load_recipe("recipes/r.yaml", ["init_from=first"]).init_from == tmp_path / "first"


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("train.learning_rate", r"--set 'train.learning_rate' has no '='"),
        ("tasks.3.weight=1", r"'3' is not a position in a list of 1"),
        ("tasks.gsm8k.weight=1", r"'gsm8k' is not a position in a list of 1"),
        ("seed.x=1", r"there is a value \(0\) where 'x' should be a key"),
        ("train.bf16={", r"--set train.bf16=\{, line \d.*not valid YAML"),
        ("train.lr=1", r"train.lr is not a known key"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(item, told):
    with pytest.raises(ConfigError, match=told):
        recipe_from(minimal(seed=0), [item])


def test_overrides_leave_the_callers_mapping_as_it_was():
    given = minimal(train={"batch_size": 2})
    recipe_from(given, ["train.batch_size=4", "tasks.0.weight=2"])
    assert given == minimal(train={"batch_size": 2})


def test_a_recipe_is_frozen_and_every_field_is_described():
    recipe = recipe_from(minimal())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1
    todo = [Recipe]
    while todo:
        model = todo.pop()
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                todo.append(field.annotation)


def test_a_model_folder_beside_the_recipe_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what is typed at a prompt may name what lies there
    (tmp_path / "tiny").mkdir()
    (tmp_path / "r.yaml").write_text("model: tiny\nmethod: lora\ntasks: [rte]\noutput: o\n")
    assert load_recipe(tmp_path / "r.yaml").model.name == str(tmp_path / "tiny")
    assert load_recipe(tmp_path / "r.yaml", ["model=org/tiny"]).model.name == "org/tiny"
    assert load_recipe(tmp_path / "r.yaml", ["model=../x"]).model.name == str(tmp_path.parent / "x")


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from multiflora.recipe import recipe_from;"
        "recipe_from({'model': 'embedded', 'method': 'rlora', 'tasks': ['gsm8k', 'rg_chain_sum'], 'output': 'x'});"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'reasoning_gym') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_recipe_without_a_learning_rate_gets_the_method_s_usual_one() -> None:
    plain = {"model": "embedded", "tasks": ["rg_chain_sum"], "output": "out"}
    assert recipe_from({**plain, "method": "lora"}).train.learning_rate == 2e-4
    assert recipe_from({**plain, "method": "prompt"}).train.learning_rate == 3e-2
    assert recipe_from({**plain, "method": "full"}).train.learning_rate == 2e-5
    given = recipe_from({**plain, "method": "prompt", "train": {"learning_rate": 1e-3}})
    assert given.train.learning_rate == 1e-3
    assert recipe_from({**plain, "method": "lora"}).train.learning_rate == 2e-4  # the others' default is untouched


def test_only_methods_that_have_target_modules_are_given_some() -> None:
    plain = {"model": "embedded", "tasks": ["rg_chain_sum"], "output": "out"}
    assert recipe_from({**plain, "method": "dora"}).method.settings == {"target_modules": "all-linear"}
    for name in ("full", "losparse", "ia3", "prompt", "prefix", "ptuning"):
        assert recipe_from({**plain, "method": name}).method.settings == {}


GOOD = {"model": "x/y", "method": "lora", "tasks": ["boolq"], "output": "o"}


@pytest.mark.parametrize("where", ["", "train", "mixture"])
def test_very_many_unknown_keys_are_told_at_once(where):
    """It took time by the square of their number: minutes for these."""
    many = {f"k{i}": 1 for i in range(30_000)}
    with pytest.raises(ConfigError, match=r"recipe has 30000 problems:\n  - .*k0 is not a known key"):
        recipe_from(GOOD | ({where: many} if where else many))


@pytest.mark.parametrize("key", ["model", "method", "output", "x" * 10**6])
def test_a_name_of_a_million_characters_is_cut_in_the_message(key):
    value = {"model": {"nam": "y" * 10**6}, "method": "y" * 10**6}.get(key, ["y" * 10**6])
    with pytest.raises(ConfigError) as caught:
        recipe_from(GOOD | {key: value})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "path", ["~no-such-user/x", "~no-such-user/x.yaml", "~no-such-user/x.jsonl", "a\0b", "a\0b.yaml"]
)
@pytest.mark.parametrize("key", ["model", "tasks", "output", "source"])
def test_a_path_that_cannot_be_is_said(key, path):
    value = {"tasks": [path], "source": path}.get(key, path)
    change = {"tasks": [{"name": "a", "source": {"train": path}}]} if key == "source" else {key: value}
    if key == "model" and path == "a\0b.yaml":
        pytest.skip("as the other")
    with pytest.raises(ConfigError, match=r"there is no user of that name|holds a NUL|is not a shipped task"):
        recipe_from(GOOD | change)
