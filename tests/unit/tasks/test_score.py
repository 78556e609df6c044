import pytest

from multiflora.errors import DataError
from multiflora.tasks import Example, GeneratorSource, load_task, verify
from multiflora.tasks.decimals import as_number
from multiflora.tasks.generator import generator_rows
from multiflora.tasks.load import examples_of
from multiflora.tasks.score import before_stop, exact, number, verifier


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("The answer is 7.", 7),
        ("so $1,234.50.", 1234.5),
        ("-3", -3),
        ("−3", -3),
        ("-$5", -5),
        ("it is .5", 0.5),
        ("3 + 4 = 7", 7),
        ("#### 1,250", 1250),
        ("12 eggs #### 4 of 30", 4),
        ("####-2\n\nQuestion: 5?", -2),
        ("$ 20", 20),
        ("(7)", 7),
        ("**7**", 7),
        ("\\boxed{7}", 7),
        ("Answer:7", 7),
        ("x=7", 7),
        ("7km", 7),
        ("1e20", 10**20),
        ("100000000000000001", 10**17 + 1),
        ("2.50 dollars", 2.5),
        ("10%", 10),
        ("there is none", None),
        ("", None),
        ("####", None),
        ("1 - 2", 2),
        # no number, but something with numbers in it
        ("1,2,3", None),
        ("1234,567", None),
        ("5-2", None),
        ("7/2", None),
        ("(1/2)", None),
        ("at 10:30", None),
        ("1.2.3", None),
        ("1999-03-05", None),
        ("vitamin B12", None),
        ("--3", None),
    ],
)
def test_the_number_a_text_answers_with(text, value):
    assert as_number(text) == value


RIGHT_AND_NEARLY = {
    "number": {
        "7": (
            ["7", " 7.0", "so 7.", "$7", "7 km", "#### 7"],
            ["7/2", "17", "-7", "7:30", "0.7", "1.7", "B7", "", "no"],
        ),
        "-3": (["-3", "−3", "it is -3.00"], ["3", "5-3", "- 3.1"]),
        "1,234.5": (["1234.5", "$1,234.50"], ["1,234", "234.5", "1.234,5"]),
        "100000000000000001": (["100000000000000001"], ["100000000000000000", "1e17"]),
        "0.1": ([".1", "0.10"], ["0.10000000000000001", "1/10"]),
    },
    "exact": {
        "5 March 1999": (["5 March 1999", " 5  March 1999\n"], ["1 March 1999", "1999", "5 march 1999"]),
        "1.2.3": (["1.2.3"], ["1.2.30", "9.2.3", "1.2"]),
        "10:30": (["10:30"], ["10:3", "1:030", "30"]),
        "1/2": (["1/2"], ["2", "1/20", "0.5"]),
        "50%": (["50%"], ["50", "5%", "50 %"]),
        "007": (["007"], ["7", "07"]),
    },
    "choices": {" yes": ([" yes", "yes"], ["no", "yes it is", "Yes"])},
}


@pytest.mark.parametrize(
    ("score", "reference", "text", "worth"),
    [
        (score, reference, text, float(group == 0))
        for score, references in RIGHT_AND_NEARLY.items()
        for reference, groups in references.items()
        for group in (0, 1)
        for text in groups[group]
    ],
)
def test_a_right_answer_scores_one_and_a_nearly_right_one_nothing(score, reference, text, worth):
    keys = {"choices": [" no", " yes"], "answer": "1", "completion": None} if score == "choices" else {}
    asked = Example("t", "t-0", "p", reference, answer=None if keys else reference)
    assert verify(spec(score=score, **keys), asked, text) == worth


def test_numbers_are_compared_as_numbers():
    assert number("7", " 7.0") == 1.0
    assert number("1,000", "#### 1000") == 1.0
    assert number("3", "4") == number("3", "no idea") == 0.0


def test_exact_forgives_white_space_only():
    assert exact("( A )", " ( A )\n") == 1.0
    assert exact("True", "true") == exact("a b", "ab") == 0.0


def test_text_ends_before_the_first_stop():
    assert before_stop("a\nb\n\nc", ["\n\n", "b"]) == "a\n"
    assert before_stop("a", ["b"]) == before_stop("a", []) == "a"


def example(**keys):
    return Example("t", "t-test-0", "p", " 4", **keys)


def spec(**keys):
    return load_task({"name": "t", "source": {"path": "o/d"}, "prompt": "p", "completion": " c", **keys})


def test_what_a_model_writes_after_its_answer_never_counts():
    asked = spec(score="number", stop=["\nQuestion:"])
    assert verify(asked, example(answer="4"), " 4\nQuestion: 2 + 3?\nAnswer: 5") == 1.0
    assert verify(asked, example(answer="5"), " 4\nQuestion: 2 + 3?\nAnswer: 5") == 0.0
    assert verify(spec(score="exact"), example(answer="yes"), " yes\nno") == 1.0


def test_a_line_end_before_the_answer_is_no_stop():
    assert verify(spec(score="exact"), example(answer="yes"), "\nyes\n") == 1.0


def test_without_an_answer_the_completion_is_the_reference():
    assert verify(spec(score="exact"), example(), " 4") == 1.0
    assert verify(spec(score="number"), example(), "4.") == 1.0


@pytest.mark.parametrize("score", ["nll", "rouge"])
def test_a_score_that_is_no_verdict_on_a_text_is_refused(score):
    with pytest.raises(DataError, match=f"task t has score '{score}'; expected exact, number or verifier"):
        verify(spec(score=score), example(), "4")


def test_a_generator_verifies_its_own_rows():
    task = load_task("rg_word_sequence_reversal")
    row = examples_of(task, "test", limit=2)[1]
    assert verify(task, row, row.completion) == 1.0
    assert verify(task, row, row.completion + "\nReverse this too") == 1.0
    assert verify(task, row, " nothing of the kind") == 0.0
    assert verify(task, row, "") == 0.0


def test_an_answer_that_the_generator_cannot_parse_is_wrong():
    source = GeneratorSource(generator="prime_factorization", sizes={"test": 3})
    assert verifier(source, 0, "not a number") == 0.0
    assert verifier(source, 0, generator_rows(source)[0]["answer"]) == 1.0
