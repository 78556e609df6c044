from hypothesis import given
from hypothesis import strategies as st

from multiflora.tasks.splits import cut, normalised, without_shared

GROUPS = st.lists(st.integers(0, 12).map(str), min_size=1, max_size=60)
SIZES = st.fixed_dictionaries(
    {}, optional={"validation": st.sampled_from([0.1, 0.5, 3]), "test": st.sampled_from([0.2, 1, 7])}
)


@given(GROUPS, SIZES, st.integers(0, 3))
def test_parts_are_disjoint_cover_all_rows_and_keep_groups_together(groups, sizes, seed):
    parts = cut(groups, sizes, seed)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(groups)))
    homes = [{groups[i] for i in part} for part in parts.values()]
    for i, home in enumerate(homes):
        assert not any(home & other for other in homes[i + 1 :])
    assert parts == cut(groups, sizes, seed)


def test_sizes_are_fractions_below_one_and_numbers_from_one_on():
    parts = cut([str(i) for i in range(100)], {"validation": 0.1, "test": 7}, seed=0)
    assert (len(parts["validation"]), len(parts["test"]), len(parts[None])) == (10, 7, 83)


def test_another_seed_cuts_otherwise():
    groups = [str(i) for i in range(50)]
    assert cut(groups, {"test": 5}, 0) != cut(groups, {"test": 5}, 1)


def test_rows_that_share_a_prompt_or_a_group_are_left_out():
    rows = [("A  b", None), ("c", "g"), ("d", "h"), ("e", None)]
    assert without_shared(rows, [("a B", None), ("x", "g")]) == [2, 3]
    assert without_shared(rows, []) == [0, 1, 2, 3]


def test_normalising_ignores_case_and_white_space_only():
    assert normalised(" What\n is 2? ") == normalised("what is 2?")
    assert normalised("what is 2?") != normalised("what is 2")
