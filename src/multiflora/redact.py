"""Keep secrets out of what a run writes: every text of the artefact passes through here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from multiflora.errors import ConfigError

__all__ = ["REDACTED", "refuse_secrets", "without_home", "without_secrets"]

REDACTED = "[redacted]"

# Shapes that the services themselves document, then what is called a secret beside an equals sign, then URL passwords
_SHAPES = (
    r"\bhf_[A-Za-z0-9]{16,}",
    r"\bapi_org_[A-Za-z0-9]{16,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",
    r"\bgh[pousr]_[A-Za-z0-9]{20,}",
    r"\bgithub_pat_[A-Za-z0-9_]{20,}",
    r"\bglpat-[A-Za-z0-9_-]{16,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bAIza[A-Za-z0-9_-]{35}",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    # a value must mix letters and digits: a prompt may well say "key=something"
    r"(?i:(?:(?<=key=)|(?<=oken=)|(?<=cret=)|(?<=word=))"
    r"(?=['\"]?[\w./+-]*[a-z])(?=['\"]?[\w./+-]*\d)['\"]?[\w./+-]{8,}['\"]?)",
    r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)",
)
_SECRET = re.compile("|".join(_SHAPES))
_SECRET_NAME = re.compile(r"(?i)(?:token|secret|passw(?:or)?d|credential|api_?key|access_?key|_key)$")


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the text with every secret replaced.

    A secret is what has the shape of one (``hf_…``, ``sk-…``, ``key=…``), and the value of any environment variable
    that is named as one (``WANDB_API_KEY``).

    Args:
        text: Any text.
        environment: Looked through for secrets; None: the process's own.

    Example:
        >>> without_secrets("wandb key=0123abcd4567", {})
        'wandb key=[redacted]'
    """
    for value in _secret_values(os.environ if environment is None else environment):
        text = text.replace(value, REDACTED)
    return _SECRET.sub(REDACTED, text)


def refuse_secrets(texts: Iterable[str], where: str) -> None:
    """Refuse a recipe that holds a secret, before any work is done: it would be written beside the adapter.

    Args:
        texts: The recipe's texts.
        where: Named in the error.

    Raises:
        ConfigError: One of them holds a secret; the message does not repeat it.
    """
    for line in (line for text in texts for line in text.splitlines()):
        clean = without_secrets(line)
        if clean != line:
            raise ConfigError(
                f"{where} holds what looks like a secret: {clean.strip()!r}. A recipe is saved beside the adapter and "
                "often shared; give secrets by environment variable (HF_TOKEN, WANDB_API_KEY, ...) or by the service's "
                "login."
            )


def without_home(text: str) -> str:
    """Return the text with the user's home folder written as ``~``, as it names a person."""
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(rf"{re.escape(home)}(?=$|[/\\\s'\"])", "~", text)


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of variables named as secrets, longest first; a short one would blot out ordinary words."""
    found = {value for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= 8}
    return sorted(found, key=len, reverse=True)
