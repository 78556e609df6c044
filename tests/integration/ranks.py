"""Several processes of one run on the CPU, as torchrun starts them, but forked: nothing is imported a second time."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
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

ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
"""And for DeepSpeed's ZeRO-2."""

ZERO3 = ZERO2 | {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
"""And for ZeRO-3, which by itself leaves small parameters whole once they were gathered."""


def deepspeed_file(**zero: object) -> dict[str, str]:
    """What it sets for a ``deepspeed_config_file``; the file's text may stand in the place of its name."""
    filled = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    text = json.dumps(dict.fromkeys(filled, "auto") | {"zero_optimization": zero})
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": base64.urlsafe_b64encode(text.encode()).decode(),
    }


def run_ranks(
    processes: int,
    words: Sequence[str],
    place: Path,
    environment: Mapping[str, str] = {},
    *,
    on_line: Callable[[str, list[BaseProcess]], None] = lambda line, ranks: None,
) -> list[int]:
    """Run the command line in ``processes`` ranks.

    Args:
        processes: How many.
        words: The command line's.
        place: What each rank said is written to ``said-RANK`` here.
        environment: Set in each.
        on_line: Called with every line that the first rank says, as it says it, and with the processes.
    Returns:
        Their exit codes.
    """
    place.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    context = multiprocessing.get_context("fork")
    listening, telling = os.pipe()
    outs = [
        telling,
        *(os.open(place / f"said-{r}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for r in range(1, processes)),
    ]
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, processes, port, list(words), outs[rank], dict(environment)))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for out in outs:
        os.close(out)
    with open(listening) as lines, (place / "said-0").open("w") as kept:
        for line in lines:
            kept.write(line)
            on_line(line, ranks)
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


def _rank(rank: int, processes: int, port: int, words: list[str], out: int, environment: Mapping[str, str]) -> None:
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
    os.dup2(out, 1)
    os.dup2(out, 2)
    # pytest's own would write to its files
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
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
