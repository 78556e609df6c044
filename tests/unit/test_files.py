"""A file is written whole or not at all."""

from __future__ import annotations

import resource
import stat
from pathlib import Path

import pytest

from multiflora.errors import EnvironmentProblem
from multiflora.files import check_inside, check_writable, write_json, write_text


def test_the_text_is_written_and_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "naïve\n")
    write_text(tmp_path / "a.txt", "東京\n")
    assert (tmp_path / "a.txt").read_bytes() == "東京\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_others_may_read_as_with_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": [1.5, None]})
    write_json(tmp_path / "b", {"y": [1.5, None], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "a", float("inf"))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the nearest thing to a full disk that needs no rights: no file may grow beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            EnvironmentProblem, match=r"No space left to write .*a\.txt.*What was there before is unchanged"
        ):
            write_text(tmp_path / "a.txt", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"Cannot write .*nowhere"):
        write_text(tmp_path / "nowhere" / "a.txt", "")


def test_a_link_in_the_files_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("as it was")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").symlink_to(tmp_path / "theirs.txt")
    write_text(tmp_path / "run" / "a.txt", "ours")
    assert (tmp_path / "theirs.txt").read_text() == "as it was"
    assert (tmp_path / "run" / "a.txt").read_text() == "ours"
    assert not (tmp_path / "run" / "a.txt").is_symlink()


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "analysis").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentProblem, match=r"run/analysis leads out of .*run, to .*elsewhere"):
        check_inside(tmp_path / "run", tmp_path / "run" / "analysis")
    with pytest.raises(EnvironmentProblem, match=r"leads out of"):
        check_inside(tmp_path / "run", tmp_path / "run" / ".." / "elsewhere")
    check_inside(tmp_path / "run", tmp_path / "run" / "not-there-yet" / "a")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has it")
def test_where_the_system_lets_nobody_make_files_that_is_said() -> None:
    for folder in ("/proc", "/proc/run", "/proc/self/run"):
        with pytest.raises(EnvironmentProblem, match=f"Cannot write {folder}: the system lets nobody make files or"):
            check_writable(Path(folder))
    with pytest.raises(EnvironmentProblem, match="Cannot write /proc/x: the system lets nobody make files or folders"):
        write_text(Path("/proc/x"), "")
