"""Two processes side by side make the steps that one process makes with the batches of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.integration.toys import make_recipe, make_tokenizer

ROOT = Path(__file__).parents[2]


def launch(recipe: Path, processes: int) -> str:
    """Run ``multiflora train`` under torchrun, and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "multiflora", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_double_batches(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    model = tmp_path / "model"
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    adapters, logs = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        # plain gradient descent without dropout: Adam's first steps would blow up the last bit of a gradient near 0
        recipe = make_recipe(
            folder,
            {"name": "rlora", "head_dropout": 0.0},
            model=str(model),
            max_steps=4,
            batch_size=8 // processes,
            packing=True,
            bf16=False,  # the sums are compared, not the rounding of the machine's own number type
            optimizer="sgd",
            learning_rate=1.0,
            log_every=1,
        )
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        printed = launch(folder / "recipe.yaml", processes)
        assert printed.count("macro average") == 1
        adapters.append(load_file(recipe.output / "adapter_model.safetensors"))
        logs.append(json.loads((recipe.output / "results.json").read_text())["training"]["log"])
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    one, two = logs
    assert one[-1]["loss"] < one[0]["loss"]
    for line, other in zip(one, two, strict=True):
        assert {key: pytest.approx(value, rel=1e-4) for key, value in line.items()} == other
