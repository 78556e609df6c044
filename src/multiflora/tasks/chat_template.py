"""A model's own chat template, rendered in the process that the system stops, as it comes from anybody.

transformers renders it in a sandbox that keeps it from code and from files, and not from a year of work or all of the
memory. What it may use and how it is compiled stay transformers' own, so the text is that of ``apply_chat_template``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from multiflora.stoppable import run

__all__ = ["Asked", "render_all", "render_chat"]


class Asked(NamedTuple):
    """A conversation to render."""

    turns: Sequence[Mapping[str, Any]]
    """The turns, as templates read them."""
    tools: Any = None
    """The tools that may be called."""
    words: Mapping[str, Any] = {}
    """``add_generation_prompt`` and what else ``apply_chat_template`` takes."""


def render_chat(asked: Asked, tokenizer: Any) -> str:
    """Return the text that a tokenizer's chat template makes of a conversation.

    Args:
        asked: The conversation.
        tokenizer: A transformers tokenizer with a chat template.

    Raises:
        ValueError: The template refuses the turns, or would take or make too much.
    """
    turns, tools, words = asked
    if _has_own_way(tokenizer):
        return str(tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, **words))
    template, special = _template(tokenizer, tools), tokenizer.special_tokens_map
    return str(run("multiflora.tasks.chat_rendered:rendered", template, special, (turns, tools, words)))


def render_all(asked: Sequence[Asked], tokenizer: Any) -> list[str | None]:
    """Render many conversations in one call, which costs more than a short template; None: it has to be done by itself.

    What fails is left for `render_chat`, whose caller can name the row.
    """
    if not asked or _has_own_way(tokenizer):
        return [None] * len(asked)
    with suppress(ValueError):
        work = [(_template(tokenizer, each.tools), tuple(each)) for each in asked]
        found: list[str | None] = run(
            "multiflora.tasks.chat_rendered:rendered_all", work, shared=tokenizer.special_tokens_map
        )
        return found
    return [None] * len(asked)


def _has_own_way(tokenizer: Any) -> bool:
    """Whether a tokenizer's class writes conversations by code of its own, without a template, as Mistral's does."""
    from transformers import PreTrainedTokenizerBase  # here, as reading a recipe does not need it

    way = getattr(type(tokenizer), "apply_chat_template", None)
    return way is not PreTrainedTokenizerBase.apply_chat_template


def _template(tokenizer: Any, tools: Any) -> str:
    """The template; some tokenizers have several, one of them for tools."""
    found = tokenizer.get_chat_template(tools=tools)
    if not isinstance(found, str):
        raise ValueError(f"it is a {type(found).__name__} and no text.")
    return found
