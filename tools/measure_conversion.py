"""How long conversion to plain LoRA takes, and how much memory, at the shapes of Llama-3.1-8B: 224 layers.

python tools/measure_conversion.py multilora [--rank 8]

An adapter of the method with random weights is written to a temporary folder and converted from there, as
`multiflora convert` does. Needs about 2 GB of disk; no model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import peft  # noqa: F401  # before modules of ours: peft's arrival loads them
import torch
from safetensors.torch import save_file

import multiflora
from multiflora.export.plain import ROOT
from multiflora.export.saved import method_of
from multiflora.methods import build_config
from multiflora.peft_bridge import prefix

HIDDEN, INNER, KEYS, BLOCKS = 4096, 14336, 1024, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
SETTINGS = {
    "multilora": {"r": 8, "num_modules": 5, "init_weights": False},
    "mlora": {"r": 8, "num_heads": 5},
    "moelora": {"r": 32, "num_experts": 8, "init_weights": False},
    "mtllora": {"r": 16, "init_weights": False},
}


def write_adapter(name: str, folder: Path) -> None:
    """Write an adapter with random weights."""
    names = [layer.split(".")[1] for layer in SHAPES]
    config = build_config(name, {"target_modules": names, "task_names": ["a", "b"], **SETTINGS[name]})
    method = method_of(config)
    assert method is not None
    generator, tensors = torch.Generator().manual_seed(0), {}
    for block in range(BLOCKS):
        for layer, (d_in, d_out) in SHAPES.items():
            shapes = method.shapes(config, config.r, d_in, d_out)
            parts = {part: torch.empty(shape) for part, shape in shapes.items()}
            method.fill(config, parts, generator)
            if method.offset(config):
                parts |= {"A0": parts["A"].clone(), "B0": method.mean_head(config, parts).clone()}
            stem = f"{ROOT}model.layers.{block}.{layer}.{prefix(name)}"
            tensors |= {stem + part: tensor for part, tensor in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))


def resident() -> float:
    """Memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Measure and print one line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("method", choices=SETTINGS)
    asked.add_argument("--rank", type=int)
    words = asked.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "ours", Path(scratch) / "plain"
        write_adapter(words.method, source)
        size = (source / "adapter_model.safetensors").stat().st_size / 2**20
        before, peak, stop = resident(), [0.0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.02):
                peak[0] = max(peak[0], resident() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, busy = time.perf_counter(), time.process_time()
        task = "a" if words.method in ("moelora", "mtllora") else None
        made = multiflora.to_lora(source, target, task=task, rank=words.rank).adapters[0]
        wall, cpu = time.perf_counter() - start, time.process_time() - busy
        stop.set()
        watcher.join()
    print(
        f"{words.method}: {size:.0f} MiB, {len(made.layers)} layers, rank {made.rank}; {wall:.1f} s, {cpu:.1f} s of "
        f"CPU; peak {peak[0]:+.0f} MiB; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
