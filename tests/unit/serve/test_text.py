"""Text comes out piece by piece, whole, and ends at a stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiflora.serve.text import Decoder, held_back


class Bytes:
    """A tokenizer whose tokens are bytes: a letter like é is two of them."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(text, stops=()):
    decoder = Decoder(Bytes(), stops)
    given_out = []
    for token in text.encode():
        given_out.append(decoder.add(token))
        if decoder.stopped:
            break
    return [*given_out, decoder.end()], decoder


@given(st.text(max_size=20))
def test_pieces_add_up_to_the_text(text):
    found, _ = pieces(text)
    assert "".join(found) == text


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=2))
def test_text_ends_before_the_stop_that_is_written_first(text, stops):
    found, decoder = pieces(text, stops)
    # writing ends as soon as one stop is whole, even where another would have begun earlier
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert decoder.stopped == bool(places)
    assert "".join(found) == (text[: min(places)] if places else text)


def test_a_letter_of_several_tokens_is_not_sent_in_halves():
    found, _ = pieces("aé")
    assert found == ["a", "", "é", ""]


def test_half_a_letter_at_the_end_is_given_out_as_the_tokenizer_has_it():
    decoder = Decoder(Bytes())
    assert decoder.add("é".encode()[0]) == ""
    assert decoder.end() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "held"), [("x", [], 0), ("xEN", ["END"], 2), ("xE", ["END", "EEE"], 1), ("EE", ["EEE"], 2)]
)
def test_what_may_begin_a_stop_is_held_back(text, stops, held):
    assert held_back(text, stops) == held
