"""The tables of docs/scaling.md: expected efficiency on many GPUs from counts and a network model, and a measurement.

python tools/scaling_note.py              # the expected efficiencies, as Markdown
python tools/scaling_note.py --measure    # one process against two on this machine's CPU, as Markdown
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RANK, HEADS = 8, 4
"""R-LoRA as assumed in the tables, on all linear layers."""

TOKENS = 8192
"""Tokens of a step on each GPU."""

FLOPS = 989e12 * 0.40
"""Operations a second: an H100's bfloat16 peak, two fifths of it reached."""

NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second and direction for each GPU: within a machine of 8, and between machines (400 Gbit/s for each GPU)."""

HOP = 10e-6
"""Seconds until a message's first byte is there."""


@dataclass(frozen=True)
class Base:
    """The shapes of a Llama."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int
    """Width of keys and values."""
    vocabulary: int = 128_256

    def linears(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of a block's linear layers."""
        h, i = self.hidden, self.intermediate
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, i), (h, i), (i, h)]

    def blocks(self) -> int:
        """Parameters that are gathered block by block."""
        return self.layers * sum(d_in * d_out for d_in, d_out in self.linears())

    def parameters(self) -> int:
        """All of them, norms left out."""
        return self.blocks() + 2 * self.vocabulary * self.hidden

    def trained(self) -> int:
        """Parameters of the adapter: the stem r·d_in, the heads H·r·d_out, the router H·d_in."""
        return self.layers * sum(RANK * d_in + HEADS * RANK * d_out + HEADS * d_in for d_in, d_out in self.linears())


BASES = (
    Base("8B", layers=32, hidden=4096, intermediate=14_336, kv=1024),
    Base("70B", layers=80, hidden=8192, intermediate=28_672, kv=1024),
)


def compute_seconds(base: Base) -> float:
    """Forward and backward through a frozen base cost 2P each for a token, a trained parameter 2 more."""
    return TOKENS * (4 * base.parameters() + 6 * base.trained()) / FLOPS


def ring_seconds(bytes_: float, gpus: int, *, passes: int) -> float:
    """A ring of N: a pass (gather or reduce-scatter) moves (N-1)/N of the bytes in N-1 hops, over the slowest link."""
    link = NVLINK if gpus <= 8 else NETWORK
    return passes * (bytes_ * (gpus - 1) / gpus / link + (gpus - 1) * HOP)


def ddp_seconds(base: Base, gpus: int) -> float:
    """The adapter's float32 gradients are all-reduced: a reduce-scatter and a gather."""
    return ring_seconds(4 * base.trained(), gpus, passes=2)


def fsdp_seconds(base: Base, gpus: int) -> float:
    """Every block's bfloat16 weights and float32 adapter are gathered forward and backward, gradients are scattered."""
    blocks = base.layers
    weights = ring_seconds((2 * base.blocks() + 4 * base.trained()) / blocks, gpus, passes=2)
    return blocks * (weights + ring_seconds(4 * base.trained() / blocks, gpus, passes=1))


def efficiencies(base: Base, communication: float) -> tuple[float, float]:
    """T₁ / T_N with equal work on each GPU: if nothing overlaps with computing, and if everything does."""
    compute = compute_seconds(base)
    return compute / (compute + communication), compute / max(compute, communication)


def expected() -> str:
    """The table of expectations."""
    rows = [
        "| base | trained | engine | GPUs | compute, s | communication, s | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    for base in BASES:
        for engine, seconds in (("DDP", ddp_seconds), ("FSDP2", fsdp_seconds)):
            if engine == "DDP" and 2 * base.parameters() > 80e9:
                continue  # the weights alone do not fit one GPU
            for gpus in (8, 64):
                communication = seconds(base, gpus)
                low, high = efficiencies(base, communication)
                rows.append(
                    f"| {base.name} | {base.trained() / 1e6:.1f} M | {engine} | {gpus} | {compute_seconds(base):.3f} | "
                    f"{communication:.3f} | {low:.0%} to {high:.0%} |"
                )
    return "\n".join(rows)


def measured(hidden_size: int, short: int, long: int) -> str:
    """Train with one process and with two at the same global batch; a step costs what more steps cost more."""
    sys.path.insert(0, str(Path(__file__).parent))
    from toy import make_toy

    import multiflora.jobs.train  # noqa: F401  # once, before the processes are forked

    rows = ["| processes | batch of each | CPU seconds a step and process | seconds a step |", "|---|---|---|---|"]
    for processes in (1, 2):
        spent = []
        for steps in (short, long):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "toy"
                recipe = make_toy(
                    folder,
                    hidden_size=hidden_size,
                    rows=256,
                    max_steps=steps,
                    batch_size=32 // processes,
                    log_every=100,
                )
                spent.append(_run(recipe, processes))
        cpu, wall = ((b - a) / (long - short) for a, b in zip(*spent, strict=True))
        rows.append(f"| {processes} | {32 // processes} | {cpu:.3f} | {wall:.3f} |")
    return "\n".join(rows)


def _run(recipe: Path, processes: int) -> tuple[float, float]:
    """Train; CPU seconds of the busiest process, and seconds by the clock."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    ranks = [context.Process(target=_rank, args=(recipe, rank, processes, port, told)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    spent = [told.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    return max(cpu for cpu, _ in spent), max(wall for _, wall in spent)


def _rank(recipe: Path, rank: int, processes: int, port: int, told: multiprocessing.Queue[tuple[float, float]]) -> None:
    import torch

    from multiflora.jobs.train import train
    from multiflora.recipe import load_recipe

    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**place, **address}.items()})
    torch.set_num_threads(1)
    cpu, wall = time.process_time(), time.perf_counter()
    train(load_recipe(recipe), quiet=True)
    told.put((time.process_time() - cpu, time.perf_counter() - wall))
    told.close()
    told.join_thread()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="one process against two on this machine's CPU")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the model that is measured")
    parser.add_argument("--steps", type=int, nargs=2, default=(4, 24), help="steps of the short and of the long run")
    asked = parser.parse_args()
    print(measured(asked.hidden_size, *asked.steps) if asked.measure else expected())
