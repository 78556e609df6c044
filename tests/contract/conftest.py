"""Every test here runs on every method; what a method refuses instead of doing, its test records with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from contract.cases import CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that asks for a case gets all of them."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=[case.id for case in CASES])


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[[object], None]:
    """For the contract table: the method refuses this, and said why."""
    return lambda why: record_property("refused", str(why))
