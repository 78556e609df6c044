"""What lies beside an adapter: whole, the same twice, without secrets, and enough to do it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from multiflora.artifact import current_command, fingerprint, package_versions, write_artifact
from multiflora.embedded import HUB_NAME
from multiflora.errors import EnvironmentProblem
from multiflora.evaluation.results import Results, TaskScore
from multiflora.recipe import Recipe, load_recipe, recipe_from

SECRET = "hf_" + "AbCdEfGh" * 4


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    tasks = [
        {"name": "sums", "about": "Adds | numbers.", "licence": "MIT", "source": {"generator": "basic_arithmetic"}},
        {"name": "sky", "source": {"path": "some/set"}, "choices": ["a", "b"]},
    ]
    plain = {"model": "embedded", "method": {"name": "rlora", "r": 4}, "tasks": tasks, "output": str(folder)}
    return recipe_from({**plain, **changes})


def score(value: float, metric: str = "acc", **changes: Any) -> TaskScore:
    one: dict[str, Any] = {"stderr": 0.05, "nll": None, "other": {}, "group": "tasks", **changes}
    return TaskScore(score=value, metric=metric, n=100, **one)


BASE: Results = {"tasks": {"sums": score(0.1), "sky": score(0.5)}, "macro": 0.3}
ADAPTED: Results = {
    "tasks": {
        "sums": score(0.6),
        "sky": score(0.7, stderr=None),
        "far": score(1.5, "nll", group="extra"),
        "harness/arc_easy": score(0.4, group="harness"),
    },
    "macro": 0.65,
}
ROW = {"examples": 80, "share_of_examples": 0.5, "tokens": 1200, "share_of_tokens": 0.25, "loss_tokens": 90}


def write(folder: Path, **changes: Any) -> dict[str, Any]:
    words: dict[str, Any] = {
        "adapted": ADAPTED,
        "base": BASE,
        "mixture": {"sums": ROW, "sky": ROW},
        "parameters": {"trainable": 1000, "total": 100000},
        "training": {"steps": 20},
        "fingerprints": {"sums": {"train": fingerprint([{"a": 1}])}},
        "seconds": {"train": 12.3456},
        "notes": ["sums: 3 of 80 examples are too long."],
        "command": "multiflora train recipe.yaml",
        **changes,
    }
    return write_artifact(folder, words.pop("recipe", None) or make_recipe(folder), **words)


def test_the_four_files_are_there_and_read_back(tmp_path: Path) -> None:
    returned = write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "recipe.yaml", "results.json", "run.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == returned
    assert load_recipe(tmp_path / "recipe.yaml") == make_recipe(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seconds"] == {"train": 12.35}
    assert {"python", "torch", "transformers", "peft", "multiflora"} <= set(run["versions"])


def test_results_are_the_same_bytes_whenever_and_however_long_it_took(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seconds={"train": 99.0}, command="another")
    first, second = ((tmp_path / name / "results.json").read_bytes() for name in "ab")
    assert first == second
    for changing in (b"seconds", b"version", b"another", b"99"):
        assert changing not in second


def test_no_secret_enters_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "thewandbsecret")
    monkeypatch.setenv("UNRELATED", "unrelatedvalue")
    recipe = make_recipe(tmp_path, train={"report_to": ["wandb", f"hub:{SECRET}", "key=0a1b2c3d4e5f"]})
    write(
        tmp_path,
        recipe=recipe,
        command=f"multiflora train r.yaml --set train.report_to={SECRET}",
        notes=[f"said {SECRET}", "and thewandbsecret"],
        training={"log": f"https://u:pw@host {SECRET}"},
        fingerprints={SECRET: 1},
    )
    for path in tmp_path.iterdir():
        text = path.read_text()
        for secret in (SECRET, "0a1b2c3d4e5f", "thewandbsecret", "u:pw", "unrelatedvalue"):
            assert secret not in text, path.name
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]["report_to"][0] == "wandb"


def test_no_file_names_this_machine_or_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "ada"
    monkeypatch.setattr(Path, "home", lambda: home)
    folder = home / "runs" / "one"
    data = home / "data" / "sums.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n")
    recipe = make_recipe(folder, tasks=[str(data)], model=str(home / "models" / "base"))
    after: Results = {"tasks": {"sums": score(0.6)}, "macro": 0.6}
    write(folder, recipe=recipe, adapted=after, base=None, command=f"multiflora train {home}/r.yaml")
    for path in folder.iterdir():
        assert str(tmp_path) not in path.read_text(), path.name
    assert "multiflora train ~/r.yaml" in (folder / "README.md").read_text()


def test_the_card_tells_the_whole_story(tmp_path: Path) -> None:
    write(tmp_path)
    card = (tmp_path / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": HUB_NAME,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["multiflora", "rlora"],
    }
    code = body.split("```python\n")[1]
    assert code.startswith("import multiflora")
    for expected in (
        "# R-LoRA adapter of HuggingFaceTB/SmolLM2-135M-Instruct for 2 tasks",
        "| sums | 100 | acc | 0.100 ± 0.050 | 0.600 ± 0.050 | +0.500 |",
        "| sky | 100 | acc | 0.500 ± 0.050 | 0.700 | +0.200 |",
        "| far (not trained on) | 100 | nll | – | 1.500 ± 0.050 | – |",
        "| arc_easy (harness) | 100 | acc | – | 0.400 ± 0.050 | – |",
        "| **macro average** |  |  | 0.300 ±0.035 | **0.650** | +0.350 |",
        r"| sums | Adds \| numbers. | reasoning-gym basic_arithmetic | MIT |",
        "| sky |  | some/set |  |",
        "| sums | 80 | 50.0% | 1,200 | 25.0% |",
        "It has 1,000 trainable parameters (1.00% of 100,000).",
        "20 steps of 8 examples",
        "- sums: 3 of 80 examples are too long.",
        "```\nmultiflora train recipe.yaml\n```",
        'tasks=["sums", "sky"]',
    ):
        assert expected in body, expected


def test_the_card_without_a_base_score_has_no_change(tmp_path: Path) -> None:
    write(tmp_path, base=None, mixture=None)
    card = (tmp_path / "README.md").read_text()
    assert "| task | n | metric | adapted |\n" in card
    assert "## Mixture" not in card


def test_the_card_says_how_a_task_is_chosen_where_the_adapter_needs_it(tmp_path: Path) -> None:
    write(tmp_path, recipe=make_recipe(tmp_path, method={"name": "moelora", "r": 4}))
    card = (tmp_path / "README.md").read_text()
    assert 'with multiflora.task(model, "sums"):' in card
    assert "simple_evaluate" not in card  # the harness alone does not tell the adapter the task


def test_every_python_block_of_the_card_compiles(tmp_path: Path) -> None:
    for method in ("lora", "rlora", "moelora"):
        for model in ("embedded", "some/model"):
            write(tmp_path, recipe=make_recipe(tmp_path, method={"name": method, "r": 4}, model=model))
            blocks = (tmp_path / "README.md").read_text().split("```python\n")[1:]
            assert blocks
            for block in blocks:
                compile(block.partition("```")[0], "card", "exec")


def test_the_adapter_names_the_embedded_model_by_its_public_name(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "base_model_name_or_path": "/home/ada/.cache/multiflora/x"}))
    write(tmp_path)
    assert json.loads(config.read_text()) == {"r": 4, "base_model_name_or_path": HUB_NAME}


def test_a_failure_half_way_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="Out of range float values"):
        write(tmp_path, training={"loss": float("nan")})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()}.keys() == old.keys()
    assert (tmp_path / "results.json").read_bytes() == old["results.json"]


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"Cannot write .*file.*Choose an output folder"):
        write(tmp_path / "file" / "run")


def test_the_command_is_what_one_would_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/multiflora", "train", "my recipe.yaml"])
    assert current_command() == "multiflora train 'my recipe.yaml'"
    monkeypatch.setattr(sys, "argv", ["/x/site-packages/multiflora/__main__.py", "train", "r.yaml"])
    assert current_command() == "multiflora train r.yaml"
    monkeypatch.setattr(sys, "argv", ["run.py", "1"])
    assert current_command() == "python run.py 1"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert "recipe.yaml" in current_command()


def test_a_fingerprint_sees_every_value_and_the_order() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    same = [dict(reversed(row.items())) for row in rows]
    assert fingerprint(rows) == fingerprint(same)
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows)["rows"] == 2
    assert fingerprint(rows)["sha256"] != fingerprint([rows[0], {**rows[1], "completion": "e"}])["sha256"]


def test_versions_are_of_what_is_installed() -> None:
    assert package_versions()["python"] == ".".join(map(str, sys.version_info[:3]))
