"""Tokens become text piece by piece, and text ends at a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Decoder", "held_back"]


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop, so must not be sent yet.

    Example:
        >>> held_back("one\\n", ["\\n\\n"]), held_back("one", ["\\n\\n"])
        (1, 0)
    """
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


class Decoder:
    """Text of a growing list of tokens.

    A token may be a part of a character, and may need its neighbours for its spaces, so a piece is given out only when
    it can no longer change.

    Args:
        tokenizer: Turns ids into text.
        stops: Texts that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.ids: list[int] = []
        self.stopped = False
        self._sure = 0  # tokens up to here are whole text
        self._seen = 0
        self._text = ""  # decoded, not yet given out

    def add(self, token: int) -> str:
        """Take one token and return what can be given out now, perhaps nothing."""
        self.ids.append(token)
        before = self._decoded(self._sure, self._seen)
        now = self._decoded(self._sure, len(self.ids))
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._sure, self._seen = self._seen, len(self.ids)
        self._text += now[len(before) :]
        return self._give(held_back(self._text, self.stops))

    def end(self) -> str:
        """Return what is left when no more tokens come."""
        if not self.stopped:
            now, before = self._decoded(self._sure, len(self.ids)), self._decoded(self._sure, self._seen)
            self._text += now[len(before) :]
        return self._give(0)

    def _give(self, hold: int) -> str:
        found = [place for stop in self.stops if (place := self._text.find(stop)) >= 0]
        if self.stopped or found:
            given, self._text = self._text[: min(found)] if found else "", ""
            self.stopped = True
            return given
        cut = len(self._text) - hold
        given, self._text = self._text[:cut], self._text[cut:]
        return given

    def _decoded(self, start: int, end: int) -> str:
        # what tidies spaces would change text that has been given out
        text: str = self.tokenizer.decode(
            self.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
