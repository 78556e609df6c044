"""Which errors a user gets in words, and with which exit code."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import typer

from multiflora.cli.errors import BAD_INPUT, STOPPED, ErrorsInWords, explain
from multiflora.errors import ConfigError, DataError, EnvironmentProblem, MultifloraError


@pytest.mark.parametrize("kind", [MultifloraError, ConfigError, DataError, EnvironmentProblem])
def test_our_errors_are_said_as_they_are(kind: type[MultifloraError]) -> None:
    assert explain(kind("seed is -1; expected 0 or more.")) == ("seed is -1; expected 0 or more.", BAD_INPUT)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so_and_names_the_file(number: int) -> None:
    answer = explain(OSError(number, "no room", "run/adapter_model.safetensors"))
    assert answer is not None
    message, code = answer
    assert code == BAD_INPUT
    assert message.startswith("No space left to write at run/adapter_model.safetensors")
    assert "--output" in message


def test_a_full_disk_is_known_in_what_a_library_in_rust_says() -> None:
    class SafetensorError(Exception):
        """Stands for safetensors', which is no OSError either."""

    answer = explain(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert answer is not None
    assert answer[0].startswith("No space left to write")


def test_a_forbidden_file_says_so() -> None:
    answer = explain(PermissionError(errno.EACCES, "Permission denied", "/home/me/recipe.yaml"))
    assert answer is not None
    assert answer[0].startswith("Permission denied at /home/me/recipe.yaml")
    assert answer[1] == BAD_INPUT


@pytest.mark.parametrize("bug", [ZeroDivisionError("x"), KeyError("x"), OSError(errno.EBADF, "x"), SystemExit(0)])
def test_a_bug_is_left_alone(bug: BaseException) -> None:
    assert explain(bug) is None
    with pytest.raises(type(bug)), ErrorsInWords(debug=False):
        raise bug


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit, match=str(STOPPED)) as end, ErrorsInWords(debug=False):
        raise KeyboardInterrupt
    assert end.value.exit_code == STOPPED
    assert "Stopped" in capsys.readouterr().err


@pytest.mark.parametrize("debug", [False, True])
def test_the_traceback_is_shown_only_with_debug(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit, match=str(BAD_INPUT)), ErrorsInWords(debug=debug):
        _refuse({"methd": "[bold]rlora[/bold]"})
    shown: Any = capsys.readouterr()
    assert shown.out == ""
    # square brackets in a message are the user's text, never markup
    assert "Error: 'methd' is not a known key ([bold]rlora[/bold])" in shown.err
    assert ("Traceback" in shown.err) is debug
    assert ("_refuse" in shown.err) is debug


def _refuse(recipe: dict[str, str]) -> None:
    for key, value in recipe.items():
        raise ConfigError(f"{key!r} is not a known key ({value})")
