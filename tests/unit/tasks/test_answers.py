"""Answers are what a model wrote; some verifiers run them, so those must be plainly a list or a formula."""

from __future__ import annotations

import inspect
import re

import pytest

from multiflora.tasks import GeneratorSource
from multiflora.tasks.answers import EVALUATE_FORMULAS, EVALUATE_LITERALS, is_plain
from multiflora.tasks.generator import generator_rows
from multiflora.tasks.score import verifier

CODE = [
    "__import__('pathlib').Path('written').touch()",
    "open('written', 'w')",
    "[open('written', 'w')]",
    "().__class__.__base__.__subclasses__()",
    "(lambda: open('written', 'w'))()",
    "[x for x in 'aaaa' for y in 'aaaa']",
    "f'{1}'",
    "S(9)",
    "factorial(10**9)",
    "5!!!!",
    "9**9**9**9",
    "(((9**99)**99)**99)**99",
    "exit()",
]


@pytest.mark.parametrize("answer", CODE)
@pytest.mark.parametrize("generator", sorted(EVALUATE_LITERALS | EVALUATE_FORMULAS))
def test_code_is_never_handed_to_a_verifier_that_would_run_it(generator, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_plain(generator, answer)
    assert verifier(GeneratorSource(generator=generator), 0, answer) <= 0.05
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("generator", "answer"),
    [
        ("n_queens", "[['Q', '_'], ['_', 'Q']]"),
        ("n_queens", "_ Q\nQ _"),
        ("spiral_matrix", "1 2 3"),
        ("string_insertion", "ABBA"),
        ("countdown", "(7 + 3) * 50 / 2"),
        ("simple_integration", "x**3/3 + 2*x + C"),
        ("intermediate_integration", "-x*cos(x) + sin(x)/2 - exp(2*x)"),
        ("polynomial_multiplication", "6*x**4 - 12.5*x*y**2 + 3"),
        ("letter_counting", "open('x')"),
    ],
)
def test_answers_of_the_kind_that_is_asked_for_are_handed_on(generator, answer):
    assert is_plain(generator, answer)


@pytest.mark.parametrize("generator", sorted(EVALUATE_LITERALS | EVALUATE_FORMULAS))
def test_every_right_answer_is_plain(generator):
    rows = generator_rows(GeneratorSource(generator=generator))
    for index in range(20):
        answer = rows[index]["answer"]
        assert answer is None or is_plain(generator, str(answer)), answer


def test_no_other_verifier_of_the_installed_reasoning_gym_evaluates_answers():
    from reasoning_gym.factory import DATASETS

    evaluates = {
        name
        for name, (dataset, _) in DATASETS.items()
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(\s*answer", inspect.getsource(dataset.score_answer))
    }
    assert evaluates == EVALUATE_LITERALS | EVALUATE_FORMULAS
