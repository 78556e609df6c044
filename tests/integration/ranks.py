"""Several processes of one run on the CPU, as torchrun starts them, but forked: nothing is imported a second time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
}
"""What ``accelerate launch`` sets for FSDP2."""


def run_ranks(processes: int, words: Sequence[str], place: Path, environment: Mapping[str, str] = {}) -> list[int]:
    """Run the command line in ``processes`` ranks; exit codes. What each said is in ``place/said-RANK``."""
    port = _free_port()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, processes, port, list(words), place, dict(environment)))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode or 0 for rank in ranks]


def said(place: Path, rank: int = 0) -> str:
    """What a rank printed."""
    return (place / f"said-{rank}").read_text()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank(rank: int, processes: int, port: int, words: list[str], place: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        **environment,
    )
    place.mkdir(parents=True, exist_ok=True)
    out = os.open(place / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    if environment.get("ACCELERATE_USE_FSDP"):
        _let_the_cpu_shard()
    from multiflora.cli import main

    sys.argv = ["multiflora", *words]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # the parent's test session must not be torn down here


def _let_the_cpu_shard() -> None:
    """accelerate turns FSDP on for accelerators only; torch's own FSDP2 runs on a CPU with gloo as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    set_device = PartialState.set_device

    def and_say_several_devices(state: PartialState) -> None:
        set_device(state)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = and_say_several_devices
