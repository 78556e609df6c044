"""No secret passes, and no ordinary word is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiflora.errors import ConfigError
from multiflora.redact import REDACTED, refuse_secrets, without_home, without_secrets

# put together here, so that no scanner of this repository takes them for real ones
SECRETS = [
    "hf_" + "AbCdEfGh" * 4,
    "sk-" + "proj4" * 6,
    "ghp_" + "a1B2" * 9,
    "AKIA" + "ABCD1234EFGH5678",
    "AIza" + "b" * 35,
    "xoxb-" + "1234567890-abc",
    "eyJhbGciOiJI" + ".eyJzdWIiOiIx" + ".sig-natu_re",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_the_shapes_of_tokens_are_replaced_and_the_rest_stays(secret: str) -> None:
    assert without_secrets(f"use {secret} here", {}) == f"use {REDACTED} here"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("wandb:key=0a1b2c3d4e5f", f"wandb:key={REDACTED}"),
        ("--set x.api_key='0a1b2c3d4e5f'", f"--set x.api_key={REDACTED}"),
        ("?token=abcd1234efgh&x=1", f"?token={REDACTED}&x=1"),
        ("PASSWORD=hunter2hunter2", f"PASSWORD={REDACTED}"),
        ("https://me:pa55word@host/x", f"https://{REDACTED}@host/x"),
    ],
)
def test_what_is_called_a_secret_is_replaced(text: str, clean: str) -> None:
    assert without_secrets(text, {}) == clean


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens=256, token=something, the key=word method",
        "{{ question }}\nkey={{ answer }}",
        "https://host/path:8080?x=1 and me@host",
        "train.learning_rate=1e-4",
        "hf_hub is a word; sk-learn too; b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    assert without_secrets(text, {}) == text


def test_values_of_variables_named_as_secrets_are_replaced() -> None:
    environment = {"WANDB_API_KEY": "plainwords", "MY_PASSWORD": "short", "HOME": "/home/somebody"}
    text = "plainwords short /home/somebody"
    assert without_secrets(text, environment) == f"{REDACTED} short /home/somebody"


def test_the_environment_is_read_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "onlyletterstoo")
    assert without_secrets("onlyletterstoo") == REDACTED


def test_a_recipe_with_a_secret_is_refused_without_repeating_it() -> None:
    secret = SECRETS[0]
    with pytest.raises(ConfigError, match=r"recipe.yaml holds what looks like a secret.*HF_TOKEN") as caught:
        refuse_secrets(["seed: 0\n", f"model: x\nreport_to: [{secret}]\n"], "recipe.yaml")
    assert secret not in str(caught.value)
    assert "report_to" in str(caught.value)
    refuse_secrets(["seed: 0\n"], "recipe.yaml")


def test_training_refuses_a_recipe_with_a_secret_before_it_reads_anything(tmp_path: Path) -> None:
    from multiflora.jobs.train import train

    recipe = {
        "model": "no/where",
        "method": "lora",
        "tasks": [{"name": "far", "source": {"path": "no/where", "revision": SECRETS[0]}}],
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(ConfigError, match=r"The recipe holds what looks like a secret: 'revision: \[redacted\]'"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_the_home_folder_becomes_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert without_home("train /home/ada/r.yaml /home/adam/x '/home/ada'") == "train ~/r.yaml /home/adam/x '~'"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert without_home("train /r.yaml") == "train /r.yaml"
