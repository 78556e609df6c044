"""A template turns a row into text: it cannot reach out, run for ever or fill the memory."""

from __future__ import annotations

import pytest

from multiflora.errors import DataError
from multiflora.tasks import load_task
from multiflora.tasks.jinja import Failure, check_expression, check_template, expression, template
from multiflora.tasks.render import render

ROW = {"text": "word " * 20_000, "xs": ["a", "b"], "n": 3, "short": "red"}

TOO_MUCH = [
    "{{ 'a' * 10**12 }}",
    "{{ 10**12 * 'a' }}",
    "{{ [text] * 10**6 }}",
    "{{ 3 ** (3 ** (3 ** 3)) }}",
    "{{ 'a' | center(10**11) }}",
    "{{ 'a'.zfill(10**11) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%9999d' | format(1) }}",
    "{{ 5 | round(-10**8) }}",
    "{{ text | replace('o', text) }}",
    "{{ text.replace('o', text) }}",
    "{{ text | wordwrap(1, wrapstring=text) }}",
    "{{ text.join(text) }}",
    "{{ xs | join(text) | join(text) }}",
    "{{ xs | tojson(indent=10**9) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ text }}{% endfor %}",
    "{% for i in range(99999) %}{{ text[1:] }}{% endfor %}",
    "{% for i in range(99999) %}{% if text == text ~ 'a' %}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{% if text is in text %}{% endif %}{% endfor %}",
    "{% set s = namespace(x='a') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "{% set s = namespace(x='a') %}{% for i in range(99) %}{% set s.x = s.x + s.x %}{% endfor %}",
    # each list holds the one before it ten times: small to keep, endless to print
    "{% set s = namespace(x=[1]) %}{% for i in range(99) %}{% set s.x = [s.x, s.x, s.x] %}{% endfor %}",
]


@pytest.mark.parametrize("source", TOO_MUCH)
def test_what_would_be_large_is_refused_before_it_is_made(source):
    with pytest.raises(Failure, match=r"more than|takes numbers up to|width above 999"):
        template(check_template(source), ROW)


OUT_OF_REACH = {
    "{{ text.__class__ }}": "unsafe",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ '{0.__class__}'.format(text) }}": "not safely callable",
    "{{ (1).to_bytes(9, 'big') }}": "not safely callable",
    "{{ xs.append(1) }}": "not safely callable",
    "{{ lipsum(5) }}": "not safely callable",
    "{{ camera.save('x') }}": "not safely callable",
    "{{ camera['save'] }}": "unsafe",
}


@pytest.mark.parametrize("source", OUT_OF_REACH)
def test_nothing_but_plain_values_can_be_looked_at_or_called(source, tmp_path, monkeypatch):
    class Camera:
        """Like an image that `datasets` decodes: a method of it writes a file."""

        def save(self, path):
            (tmp_path / path).write_text("written")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match=OUT_OF_REACH[source]):
        template(source, {**ROW, "camera": Camera()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "tag"),
    [
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "macro"),
        ("{% call(x) y() %}{% endcall %}", "call"),
        ("{% include '/etc/passwd' %}", "include"),
        ("{% import 'x' as y %}", "import"),
        ("{% from 'x' import y %}", "from"),
        ("{% extends 'x' %}", "extends"),
        ("{% block a %}{% endblock %}", "block"),
        ("{% for x in xs recursive %}{{ loop(xs) }}{% endfor %}", "for ... recursive"),
    ],
)
def test_tags_that_templates_of_tasks_have_no_use_for_are_named(source, tag):
    with pytest.raises(ValueError, match=rf"\{{% {tag} %\}} is not available in templates of tasks"):
        check_template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "-" * 3000 + "1 }}",
        "{% for i in xs %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_nesting_beyond_pythons_own_is_said(source):
    with pytest.raises(ValueError, match="nested too deeply"):
        check_template(source)


def test_a_long_template_and_a_long_number_are_refused():
    with pytest.raises(ValueError, match="has 100,001 characters; expected at most 100,000"):
        check_template("x" * 100_001)
    with pytest.raises(ValueError, match="not a Jinja expression: Exceeds the limit"):
        check_expression("9" * 5000)


def test_a_search_that_would_never_end_is_stopped(monkeypatch):
    monkeypatch.setattr("multiflora.tasks.jinja.REGEX_SECONDS", 0.05)
    with pytest.raises(Failure, match=r"works on this text for more than"):
        template(r"{{ text | without('(?:(?:[a-z]*)*\\s?)*\\d') }}", {"text": "word" * 400 + "!"})
    with pytest.raises(Failure, match=r"'\[' is not a regular expression"):
        template("{{ text | without('[') }}", ROW)


def test_what_tasks_do_need_works_as_before():
    assert (
        template("{% for x in xs %}{{ loop.index }}{{ x | upper }}{{ ', ' if not loop.last }}{% endfor %}", ROW)
        == "1A, 2B"
    )
    assert template("{{ '%.2f' % (n / 7) }} {{ '%s' | format(n) }} {{ short.replace('r', 'b') }}", ROW) == "0.43 3 bed"
    assert template("{{ xs | join(', ') }} {{ ', '.join(xs) }} {{ [n, 4] | sum }}", ROW) == "a, b a, b 7"
    assert (
        template("{% set s = namespace(n=0) %}{% for x in xs %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}", ROW)
        == "2"
    )
    assert expression("xs | map('upper') | prefix(' ')", ROW) == [" A", " B"]
    assert expression("row.n + 1 if short is defined else none", ROW) == 4


def test_half_a_character_is_refused_where_it_stands():
    spec = load_task({"name": "t", "source": "x/", "prompt": "{{ p }}", "completion": " a"})
    with pytest.raises(DataError, match=r"row 3: a text of task t holds '\\ud800', half of a character"):
        render(spec, {"p": "a \ud800"}, "row 3")
