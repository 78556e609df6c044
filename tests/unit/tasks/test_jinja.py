"""A template turns a row into text: it cannot reach out, run for ever or fill the memory."""

from __future__ import annotations

import pytest

from multiflora.errors import DataError
from multiflora.stoppable import run
from multiflora.tasks import load_task
from multiflora.tasks.jinja import Failure, ahead, check_expression, check_template, expression, template
from multiflora.tasks.load import examples_of
from multiflora.tasks.render import render

ROW = {"text": "word " * 20_000, "xs": ["a", "b"], "n": 3, "short": "red"}

TOO_MUCH = [
    "{{ 'a' * 10**12 }}",
    "{{ 'a' | center(10**11) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ text | replace('o', text) }}",
    "{{ text.join(text) }}",
    "{{ xs | tojson(indent=10**9) }}",
    "{{ text * 101 }}",
    "{% set s = namespace(x='a') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
]
TOO_LONG = [
    # each list holds the one before it three times: small to keep, endless to print
    "{% set s = namespace(x=[1]) %}{% for i in range(99) %}{% set s.x = [s.x] * 3 %}{% endfor %}{{ s.x | string }}",
    "{{ 3 ** (3 ** (3 ** 3)) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    # much within one call: nothing between its beginning and its end could count
    "{% set s = text * 500 %}{% for i in range(99999) %}{{ s.count('ab') }}{% endfor %}",
    "{% set s = text * 500 %}{% for i in range(99999) %}{{ ('wordwordx' in s) | string }}{% endfor %}",
    "{% set r = range(99999) | list %}{% for i in r %}{{ r | sum }}{{ r | max }}{% endfor %}",
    "{{ (9 ** 99999 * 9 ** 99999) ** 40 % 7 }}",
    r"{{ ('word' * 400 ~ '!') | without('(?:(?:[a-z]*)*\\s?)*\\d') }}",
]


@pytest.mark.parametrize("source", TOO_MUCH)
def test_what_would_fill_the_memory_is_refused(source):
    with pytest.raises(Failure, match=r"takes more than 512 MiB of memory|gives more than 10,000,000 characters"):
        template(check_template(source), ROW)


@pytest.mark.parametrize("source", TOO_LONG)
def test_what_would_run_for_long_is_stopped_even_within_one_call(source, monkeypatch):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.2)
    with pytest.raises(Failure, match=r"takes more than 0\.2 seconds"):
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
        ("{% autoescape true %}{% endautoescape %}", "autoescape"),
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


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ text | without('[') }}", r"'\[' is not a regular expression"),
        ("{{ text | truncate(1) }}", "expected length >= 3"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ xs | sum(start='') }}", "can only concatenate|sum"),
        ("{{ thing }}", "a value to print is no text"),
    ],
)
def test_what_does_not_fit_the_row_is_said(source, why):
    with pytest.raises(Failure, match=why):
        template(check_template(source), {**ROW, "thing": object()})


def test_a_long_template_is_shown_by_its_beginning():
    with pytest.raises(ValueError, match="not a Jinja template") as caught:
        check_template("{{ " + "x" * 90_000 + " y")
    assert len(str(caught.value)) < 500


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
    with pytest.raises(DataError, match=r"row 3: the prompt of task t holds '\\ud800', half of a character"):
        render(spec, {"p": "a \ud800"}, "row 3")


def test_rows_rendered_ahead_give_what_single_ones_do(monkeypatch):
    monkeypatch.setattr("multiflora.tasks.jinja.AHEAD", 2)
    rows = [{"n": 1}, {"n": None}, {"n": 3}, {}, {"n": "a"}]
    sources = [("n is {{ n }}", False), ("n", True)]

    def results(rows):
        for row in rows:
            for source, is_expression in sources:
                try:
                    yield repr((expression if is_expression else template)(source, row))
                except Failure as error:
                    yield f"{type(error).__name__}: {error}"

    alone = list(results(rows))
    calls = []
    monkeypatch.setattr(
        "multiflora.tasks.jinja.run", lambda *words, **named: calls.append(words[0]) or run(*words, **named)
    )
    assert list(results(ahead(rows, lambda row: row, sources))) == alone
    assert calls == ["multiflora.tasks.jinja:rendered_all"] * 3


def test_a_row_that_cannot_be_rendered_ahead_fails_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.2)
    lines = [f'{{"prompt": "a", "completion": "b", "n": {n}}}' for n in (1, 1, 99999, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    prompt = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ prompt }}"
    task = {"name": "t", "source": str(tmp_path / "rows.jsonl"), "prompt": prompt, "completion": " b"}
    with pytest.raises(DataError, match=r"line 3: the prompt of task t fails on this row: it takes more than 0\.2 sec"):
        examples_of(load_task(task), "train")


@pytest.mark.parametrize("source", ["9**9999", "[1, [9**9999]]", "{'a': -9**9999}"])
def test_a_number_that_python_would_not_write_is_refused_where_it_is_made(source: str) -> None:
    with pytest.raises(ValueError, match="a whole number of more than 4,000 digits"):
        expression(source, {})
    assert expression("9**99", {}) == 9**99
