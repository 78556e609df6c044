"""Processes agree on flags at the same step: at once when alone, a step later side by side."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from multiflora.training.agree import Agreement


def test_alone_a_flag_counts_at_once() -> None:
    alone = Agreement()
    assert alone.later([True, False]) == [True, False]
    assert alone.now([False, True]) == [False, True]
    assert alone.gather("mine") == ["mine"]
    assert alone.from_first(lambda: {"macro": 0.5}) == {"macro": 0.5}


def _talk(rank: int, meeting: Path, heard: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2)
    both = Agreement()
    heard.put(
        (
            rank,
            [
                both.later([rank == 0, False]),  # nothing was handed in before
                both.later([False, rank == 1]),
                both.now([False, False]),  # what is under way counts
                both.later([False, False]),
                both.gather(rank),
                both.from_first(lambda: {"by": rank}),
            ],
        )
    )
    heard.close()
    heard.join_thread()
    os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_side_by_side_all_hear_the_same_a_step_later(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    heard = context.Queue()
    ranks = [context.Process(target=_talk, args=(rank, tmp_path / "meeting", heard)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    answers = dict(heard.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert answers[0] == answers[1] == [[False, False], [True, False], [False, True], [False, False], [0, 1], {"by": 0}]
