"""How many tokens a second vLLM writes with our adapters, beside the base model alone and a plain LoRA of equal size.

.integrations/vllm/bin/python tools/measure_vllm.py [--dtype bfloat16] [--rounds 2] [--eager]

SmolLM2-135M with random weights and adapters, which cost what trained ones cost; answers are greedy and end at their
length. Each engine is a process of its own that sleeps while another is measured; all loads run once a round, in an
order drawn anew. With --eager no engine compiles the model, which those with --enable-lora never do on a processor: it
saves minutes. Prints one table: tokens a second of processor time, and the ratios to other rows, each formed within
a round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

PROMPT, TOKENS = 64, 16
"""Tokens of each prompt, and of each answer."""
MANY = 16
ALONE, FEW = "R-LoRA alone (--hf-overrides)", "R-LoRA (--lora-modules)"
BASE, PLAIN = "base model", "plain LoRA, vLLM's own kernels"
BASE_AMONG, MIXED = "base model, where --enable-lora is on", "base model and four adapters, in turn"
ADAPTERS = {"rlora": "rlora", "hydralora": "hydralora", "mtllora": "mtllora#0", "plain": "plain"}
"""What is served beside the base model: name -> path below the folder of adapters."""


class Load(NamedTuple):
    """What is asked of an engine."""

    engine: str
    adapters: tuple[str, ...]
    """Of the requests, in turn; "" for the base model."""


LOADS = {
    BASE: Load("base", ("",)),
    ALONE: Load("alone", ("",)),
    BASE_AMONG: Load("many", ("",)),
    PLAIN: Load("plain", ("plain",)),
    FEW: Load("many", ("rlora",)),
    MIXED: Load("many", ("", *ADAPTERS)),
}


def settings(folder: Path, dtype: str, rank: int, eager: bool) -> dict[str, tuple[dict[str, Any], bool]]:
    """Every engine's settings, and whether our plug-in is loaded into it."""
    ranks = next(size for size in (8, 16, 32, 64, 128) if size >= rank)
    model = {"model": str(folder / "model"), "dtype": dtype, "max_model_len": 256, "max_num_seqs": MANY}
    model |= {"skip_tokenizer_init": True, "enable_prefix_caching": False, "enforce_eager": eager}
    lora = {"enable_lora": True, "max_lora_rank": ranks}
    section = {"architectures": ["MultifloraForCausalLM"], "multiflora": {"adapter": str(folder / "rlora")}}
    return {
        "base": (model, False),
        "alone": (model | {"hf_overrides": section}, True),
        "plain": (model | lora, False),
        "many": (model | lora | {"max_loras": len(ADAPTERS)}, True),
    }


def write(folder: Path, dtype: str) -> int:
    """Write the model and the adapters; gives the rank at which a plain LoRA is as large as R-LoRA."""
    from peft import LoraConfig

    from multiflora.bench.generate import METHODS
    from multiflora.bench.steps import adapt, matched_rank, smollm2
    from multiflora.methods import build_config

    base: Any = smollm2(getattr(torch, dtype), torch.device("cpu"))
    base.save_pretrained(folder / "model")
    rank = 0
    for name in ADAPTERS:
        words = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        own = {"r": rank, "lora_alpha": rank} if name == "plain" else METHODS[name]
        adapted: Any = adapt(base, LoraConfig(**own, **words) if name == "plain" else build_config(name, own | words))
        adapted.save_pretrained(folder / name)
        rank = rank or matched_rank(base, sum(one.numel() for one in adapted.parameters() if one.requires_grad))
    return rank


def work(pipe: Any, words: dict[str, Any], ours: bool, folder: Path, threads: int) -> None:
    """An engine in a process of its own: answers one load after the other, until there is none."""
    os.environ["VLLM_PLUGINS"] = "multiflora" if ours else ""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    made = LLM(**words)
    torch.set_num_threads(threads)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    served = {name: LoRARequest(name, 1 + k, str(folder / path)) for k, (name, path) in enumerate(ADAPTERS.items())}
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        adapters, clients = asked
        prompts = [{"prompt_token_ids": [(31 * k + 7 * j) % 5000 + 5 for j in range(PROMPT)]} for k in range(clients)]
        each = [served.get(adapters[k % len(adapters)]) for k in range(clients)]
        wall, cpu = time.perf_counter(), time.process_time()
        answers = made.generate(prompts, greedy, lora_request=each if any(each) else None, use_tqdm=False)
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        assert all(len(answer.outputs[0].token_ids) == TOKENS for answer in answers)
        pipe.send(taken)


@contextmanager
def engine(*words: Any) -> Iterator[Any]:
    """An engine that waits for loads at the other end of a pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *words))
    process.start()
    there.close()
    try:
        here.recv()
        yield here
    finally:
        if process.is_alive():
            here.send(None)
            process.join(30)
            process.kill()


def main() -> None:
    """Measure and print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked.add_argument("--rounds", type=int, default=2)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--eager", action="store_true")
    words = asked.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    os.environ["OMP_NUM_THREADS"] = str(words.threads)
    from multiflora.bench.stats import median, ratio
    from multiflora.bench.timing import Phases, interleave, samples

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        rank = write(folder, words.dtype)
        engines = {
            name: stack.enter_context(engine(*given, folder, words.threads))
            for name, given in settings(folder, words.dtype, rank, words.eager).items()
        }

        def run(load: Load, clients: int) -> Callable[[], Phases]:
            def once() -> Phases:
                engines[load.engine].send((load.adapters, clients))
                return {"answers": engines[load.engine].recv()}

            return once

        cases = {(name, clients): run(load, clients) for name, load in LOADS.items() for clients in (1, MANY)}
        del cases[MIXED, 1]
        named = {f"{name}/{clients}": one for (name, clients), one in cases.items()}
        taken = samples(interleave(named, words.rounds))
    import vllm

    print(
        f"vLLM {vllm.__version__}, torch {torch.__version__}, {words.dtype}, {words.threads} thread(s), "
        f"{'eager' if words.eager else 'compiled where vLLM does so'}, SmolLM2-135M, "
        f"prompts of {PROMPT} and answers of {TOKENS} tokens, plain LoRA of rank {rank}, {words.rounds} rounds; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(f"\n| | 1 client | of base | of plain LoRA | {MANY} clients | of base | of plain LoRA |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in LOADS:
        row = [name]
        for clients in (1, MANY):
            if (name, clients) not in cases:
                row += [""] * 3
                continue
            cpu = [taken[f"{one}/{clients}"]["answers"]["cpu"] for one in (name, BASE, PLAIN)]
            row.append(f"{clients * TOKENS / median(cpu[0]):.1f}")
            row += [f"{ratio(other, cpu[0]).value:.2f}" for other in cpu[1:]]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
