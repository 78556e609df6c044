"""What is here, what is missing for which feature, and whether a recipe fits the machine."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from cli.parts import save_model, write_task

from multiflora import doctor
from multiflora.doctor import diagnose


def named(checks, name):
    return next(check for check in checks if check.name == name)


@pytest.fixture
def recipe(tmp_path):
    write_task(tmp_path, "roses")
    save_model(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: ./model\nmethod: {name: lora, r: 2}\ntasks: [./roses.jsonl]\ntrain: {max_steps: 2}\noutput: run\n"
    )
    return path


def test_what_is_installed_is_told_with_its_version():
    found = diagnose()
    assert named(found.packages, "peft").says == importlib.metadata.version("peft")
    assert {"system", "memory", "disk"} <= {check.name for check in found.machine}
    assert found.can_run
    assert json.loads(json.dumps(found.to_dict()))["recipe"] == []


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("gguf", "trl") else real(name))
    found = diagnose()
    assert named(found.features, "demo").state == "missing"
    assert "gguf not installed" in named(found.features, "demo").says
    assert named(found.features, "demo").mend == "pip install 'multiflora[demo]'"
    assert named(found.packages, "trl").mend.startswith("pip install 'trl>=")


def test_a_version_that_is_too_old_is_a_problem(monkeypatch, recipe):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == "trl" else real(name))
    found = diagnose(recipe)
    assert named(found.packages, "trl").state == "problem"
    assert "0.1; >=" in named(found.packages, "trl").says
    assert not found.can_run


def test_a_recipe_that_fits_is_told_what_it_takes(recipe):
    found = diagnose(recipe)
    assert found.can_run, found.recipe
    assert {check.name for check in found.recipe} == {"recipe", "output", "data", "memory", "disk"}
    assert named(found.recipe, "memory").says.startswith("about ")
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("where", "what", "says"),
    [("memory_available", "memory", "are free on this machine"), ("disk_free", "disk", "are free on")],
)
def test_a_recipe_that_does_not_fit_cannot_run(where, what, says, recipe, monkeypatch):
    monkeypatch.setattr(doctor, where, lambda *_: 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check = named(diagnose(recipe).recipe, what)
    assert check.state == "problem"
    assert "about" in check.says
    assert says in check.says
    assert check.mend


def test_a_recipe_with_a_mistake_cannot_run(recipe):
    recipe.write_text(recipe.read_text().replace("r: 2", "rr: 2"))
    found = diagnose(recipe)
    assert not found.can_run
    assert "method.rr is not a setting of lora" in " ".join(check.says for check in found.recipe)
    assert not diagnose(recipe, ["train.max_step=3"]).can_run
