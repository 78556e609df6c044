"""Serving: real HTTP clients on this machine's loopback, of `multiflora serve` and of `transformers serve`.

The model is SmolLM2-135M with random weights and a tokenizer of one word a token; nothing ends an answer but its
length, so each server writes the same number of tokens. Every load is so many requests and ends when they are answered.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from multiflora.bench.generate import METHODS, TASKS
from multiflora.bench.results import ServeCase
from multiflora.bench.steps import adapt, smollm2
from multiflora.bench.timing import Phases, interleave, samples
from multiflora.errors import EnvironmentProblem
from multiflora.methods import build_config

__all__ = ["Order", "Server", "ask", "first_tokens", "load", "measure_serve"]

ADAPTERS = ("rlora", "multilora", "hydralora", "mtllora")
"""What is served beside the base model; the last is gated by task."""
LONG, SHORT = 512, 8
"""Tokens of the long answer, and of the prompt of the short ones beside it."""
PATIENCE = 600.0
"""Seconds that a server may take to start, or to send the next piece."""


class Order(NamedTuple):
    """One request."""

    model: str
    prompt: str
    tokens: int
    task: str | None = None


class Server(NamedTuple):
    """A server that runs."""

    address: tuple[str, int]
    process: Any
    """psutil's."""

    def cpu(self) -> float:
        """Seconds of processor time it has taken."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        """Bytes it holds."""
        return int(self.process.memory_info().rss)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run inside, and at no other time: a server that waits may take time from the one that is measured."""
        self.process.resume()
        try:
            yield
        finally:
            self.process.suspend()


def ask(address: tuple[str, int], order: Order, seen: Callable[[int], None] = lambda number: None) -> int:
    """Send a request and read the answer as it is written.

    Args:
        address: Host and port.
        order: The request.
        seen: Called with the number of tokens so far, whenever some have come.

    Returns:
        How many tokens came.

    Raises:
        EnvironmentProblem: The server answered with an error.
    """
    body = {"model": order.model, "prompt": order.prompt, "max_tokens": order.tokens, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"} | ({"X-Multiflora-Task": order.task} if order.task else {})
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    written = 0
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise EnvironmentProblem(
                f"The server on port {address[1]} answered with status {answer.status} to a request for "
                f"{order.model}: {answer.read(300).decode(errors='replace')}. Serve the model by hand to see why."
            )
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices") or [{}]
                if new := len((choices[0].get("text") or "").split()):
                    written += new
                    seen(written)
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentProblem(
            f"The server on port {address[1]} hung up: {error}. Serve the model by hand to see why."
        ) from error
    finally:
        connection.close()
    return written


def load(server: Server, orders: Sequence[Order], clients: int) -> tuple[Phases, int]:
    """Answer all orders, so many at a time.

    Returns:
        The seconds it took, by the wall and of the server's processor time, and the tokens that came.
    """
    wall, cpu = time.perf_counter(), server.cpu()
    with ThreadPoolExecutor(clients) as pool:
        written = sum(pool.map(lambda order: ask(server.address, order), orders))
    return {"answers": {"wall": time.perf_counter() - wall, "cpu": server.cpu() - cpu}}, written


def first_tokens(address: tuple[str, int], long: Order, short: Order, times: int) -> list[int]:
    """How many tokens of a long answer come between a short request and its first token.

    Args:
        address: Host and port.
        long: The long answer.
        short: The short request, sent again and again while the long answer is written.
        times: How often.

    Raises:
        EnvironmentProblem: The long answer was over before.
    """
    so_far, waited = [0], []

    def count(number: int) -> None:
        so_far[0] = number

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, address, long, count)
        for _ in range(times):
            before = so_far[0]
            while so_far[0] < before + 3 and not running.done():  # it runs, and the short one before has left
                time.sleep(0.001)
            sent, first = so_far[0], _Times(so_far)
            ask(address, short, first)
            if running.done():
                break
            waited.append(first.seen[0] - sent)
        running.result()
    if not waited:
        raise EnvironmentProblem(
            f"The answer of {long.tokens} tokens was over before a short request was answered beside it."
        )
    return waited


class _Times:
    """Notes how long the long answer is, whenever the short one has a token."""

    def __init__(self, so_far: Sequence[int]) -> None:
        self.so_far = so_far
        self.seen: list[int] = []

    def __call__(self, number: int) -> None:
        self.seen.append(self.so_far[0])


def measure_serve(
    *,
    clients: int,
    prompt: int,
    tokens: int,
    requests: int,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    changes: Mapping[str, Any] | None = None,
    after_round: Callable[[], None] | None = None,
) -> ServeCase:
    """Serve the model with four adapters, and let clients ask.

    Args:
        clients: How many ask at once, in all loads but "base, 1 client".
        prompt: Tokens of each prompt.
        tokens: Of each answer.
        requests: Over how many short requests the server's memory is watched.
        dtype: Of the model's weights; adapters are float32.
        rounds: Rounds that count.
        device: Where; a server takes the GPU where it sees one.
        changes: Of the model's config.
        after_round: Called after every round.
    """
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _save(folder, dtype, changes or {})
        adapters = [f"{adapter}={folder / adapter}" for adapter in ADAPTERS]
        words = ["-m", "multiflora", "serve", str(folder / "model"), *adapters, "--name", "base"]
        ours = stack.enter_context(_running(words, folder / "ours.log"))
        opponent, why = None, ""
        words = ["-m", "transformers.cli.transformers", "serve", str(folder / "model"), "--continuous-batching"]
        try:
            opponent = stack.enter_context(_running([*words, "--host", "127.0.0.1"], folder / "theirs.log"))
        except EnvironmentProblem as error:
            why = str(error)
        loads = {
            "base, 1 client": (ours, ["base"], 1),
            "base": (ours, ["base"], clients),
            "rlora": (ours, ["rlora"], clients),
            "mixed": (ours, ["base", *ADAPTERS], clients),
        }
        if opponent is not None:
            loads["transformers serve"] = (opponent, [str(folder / "model")], clients)
        written: dict[str, int] = {}

        def run(name: str) -> Callable[[], Phases]:
            server, models, count = loads[name]
            orders = [_order(models[k % len(models)], k, prompt, tokens) for k in range(max(count, 2))]

            def once() -> Phases:
                with server.awake():
                    phases, written[name] = load(server, orders, count)
                return phases

            return once

        taken = interleave({name: run(name) for name in loads}, rounds, after_round=after_round)
        with ours.awake():
            long, short = _order("rlora", 0, prompt, LONG), _order("base", 1, SHORT, 2)
            waited = first_tokens(ours.address, long, short, 8)
            held = _memory(ours, requests, clients)
    return ServeCase(
        model="SmolLM2-135M",
        clients=clients,
        prompt=prompt,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        written=written,
        seconds=samples(taken),
        first_tokens=waited,
        requests=requests,
        memory=held,
        left_out=why,
    )


def _order(model: str, number: int, prompt: int, tokens: int) -> Order:
    """A request whose prompt is its own: words by its number."""
    text = " ".join(f"w{17 * number + k + 5}" for k in range(prompt))
    return Order(model, text, tokens, str(number // 5 % TASKS) if model == "mtllora" else None)


def _memory(server: Server, requests: int, clients: int) -> list[int]:
    """Bytes after each twentieth of so many short requests."""
    held = []
    part = max(1, requests // 20)
    for start in range(0, requests, part):
        models = ("base", *ADAPTERS)
        load(server, [_order(models[k % 5], k, SHORT, 2) for k in range(start, start + part)], clients)
        held.append(server.memory())
    return held


def _save(folder: Path, dtype: torch.dtype, changes: Mapping[str, Any]) -> None:
    """The model, its tokenizer and the adapters, as folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base: Any = smollm2(dtype, torch.device("cpu"), **changes)
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    base.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(base.config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "model")
    for name in ADAPTERS:
        config = build_config(name, {**METHODS[name], "target_modules": "all-linear", "task_type": "CAUSAL_LM"})
        adapted: Any = adapt(base, config)
        adapted.save_pretrained(folder / name)


@contextmanager
def _running(words: Sequence[str], log: Path) -> Iterator[Server]:
    """A server as a process of its own, asleep between loads, ended on leaving.

    Raises:
        EnvironmentProblem: It does not start.
    """
    import psutil

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = ("127.0.0.1", free.getsockname()[1])
    threads = str(torch.get_num_threads())
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        log.open("wb") as into,
        subprocess.Popen(
            [sys.executable, *words, "--port", str(address[1])], stdout=into, stderr=into, env=environment
        ) as process,
    ):
        server = Server(address, psutil.Process(process.pid))
        try:
            _wait(server, process, log)
            server.process.suspend()
            yield server
        finally:
            if process.poll() is None:
                server.process.resume()
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        connection = http.client.HTTPConnection(*server.address, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
    raise EnvironmentProblem(f"A server did not start: {' '.join(last) or 'it said nothing'}.")
