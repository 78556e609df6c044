"""Results with times that are set by hand, so that every ratio is known."""

from __future__ import annotations

from typing import Any

from multiflora.bench.results import (
    ExpertsCase,
    ExpertsWork,
    GenerateCase,
    LayerCase,
    Machine,
    MemoryCase,
    Results,
    ServeCase,
    SharedCase,
    StepCase,
    TrainingCase,
)


def made(rounds: int = 4, **totals: float) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Samples of competitors that take so many milliseconds, a quarter of them forward; twice that by the wall."""
    seconds = {}
    for name, milliseconds in totals.items():
        phases = {"forward": 0.25e-3 * milliseconds, "backward": 0.75e-3 * milliseconds}
        seconds[name.replace("_", " ")] = {
            phase: {"cpu": [value] * rounds, "wall": [2 * value] * rounds} for phase, value in phases.items()
        }
    return seconds


def machine(**changes: Any) -> Machine:
    return Machine(
        **{
            "kind": "cpu",
            "device": "Some Processor",
            "cores": 2,
            "threads": 1,
            "native_bf16": True,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "gemm_rate": {"float32": 1e11, "bfloat16": 2e11},
            "copy_rate": 3e10,
            **changes,
        }
    )


LAYER: dict[str, Any] = {
    "model": "SmolLM2-135M",
    "layer": "up_proj",
    "d_in": 576,
    "d_out": 1536,
    "tokens": 512,
    "dtype": "bfloat16",
    "heads": 5,
    "rank": 8,
}


def layer(dropout: float, *, packed: float, model: str = "SmolLM2-135M", **others: float) -> LayerCase:
    """A layer whose frozen part takes 10 ms, peft's LoRA 15, the loop 30, the products alone 1."""
    times = {"frozen": 10.0, "packed": packed, "peft": 15.0, "loop": 30.0, "products": 1.0, **others}
    return LayerCase(
        **LAYER | {"model": model},
        dropout=dropout,
        peft_rank=30,
        seconds=made(**times),  # type: ignore[arg-type]
        kept_bytes={"frozen": 0, "packed": 1000, "peft": 2000, "loop": 90000},
        peak_bytes={"frozen": 5_000_000, "packed": 6_000_000, "peft": 7_000_000, "loop": 20_000_000},
        flops=1e8,
        bytes=1e6,
        profile={"frozen": {"aten::mm": 0.009}, "packed": {"aten::mm": 0.01, "aten::mul": 0.002}},
    )


def step(dropout: float, **milliseconds: float) -> StepCase:
    times = {"frozen": 1000.0, "packed": 1200.0, "peft": 1500.0, "multilora": 1100.0, "products": 100.0}
    seconds = made(**times | {"peft_3r": 1400.0} | milliseconds)
    for name in seconds:
        seconds[name]["update"] = {"cpu": [0.0] * 4, "wall": [0.0] * 4}
    return StepCase(
        model="SmolLM2-135M",
        rows=2,
        length=256,
        labels=32,
        dtype="bfloat16",
        dropout=dropout,
        parameters={"frozen": 0, "packed": 8_000_000, "peft": 8_100_000},
        seconds=seconds,  # type: ignore[arg-type]
        peak_bytes={"frozen": 300_000_000},
        flops=1e10,
        bytes=1e8,
        profile={"frozen": {"aten::mm": 0.9}, "packed": {"aten::mm": 1.0}},
    )


def serving(**changes: Any) -> ServeCase:
    """Loads of 320 tokens in so many seconds by the wall, and a tenth of that of the server's time."""
    times = {"base, 1 client": 16.0, "base": 2.0, "rlora": 2.5, "mixed": 4.0, "transformers serve": 3.0}
    fields: dict[str, Any] = {
        "model": "SmolLM2-135M",
        "clients": 16,
        "prompt": 32,
        "tokens": 20,
        "dtype": "float32",
        "written": dict.fromkeys(times, 320) | {"base, 1 client": 160},
        "seconds": {name: {"answers": {"wall": [value] * 3, "cpu": [value / 10] * 3}} for name, value in times.items()},
        "first_tokens": [1, 2, 2, 9],
        "requests": 1000,
        "memory": [500_000_000, 900_000_000, 1_000_000_000, 1_010_000_000],
    }
    return ServeCase(**fields | changes)


def generate(batch: int, prompt: int = 32, tokens: int = 4, **milliseconds: float) -> GenerateCase:
    """Four tokens at 20 ms each after a prefill of 100 ms for the model alone; a twentieth more with most methods."""
    a_token = {"base": 20.0, "multilora": 21.0, "mlora": 21.0, "rlora": 21.0, "hydralora": 21.0, "rlora-2": 21.0}
    a_token |= {"rlora-16": 23.0, "mtllora": 24.0, "moelora": 24.0, "peft": 30.0, "peft merged": 20.0, "loop": 60.0}
    a_token |= {"products": 1.0, **milliseconds}
    long = {"base": 100.0, "mtllora": 112.0, "moelora": 112.0, "loop": 300.0, "products": 1.0}
    seconds = {
        name: {
            phase: {"cpu": [1e-3 * value] * 4, "wall": [2e-3 * value] * 4}
            for phase, value in (("prefill", long.get(name, 104.0)), ("decode", tokens * each))
        }
        for name, each in a_token.items()
    }
    return GenerateCase(
        model="SmolLM2-135M",
        batch=batch,
        prompt=prompt,
        tokens=tokens,
        dtype="bfloat16",
        parameters={"rlora": 8_000_000, "peft": 8_100_000},
        seconds=seconds,  # type: ignore[arg-type]
    )


def experts(work: ExpertsWork, tokens: int, **milliseconds: float) -> ExpertsCase:
    """The frozen experts take 10 ms, ours 12, peft's LoRA 30."""
    return ExpertsCase(
        model="a mixture",
        d_model=1024,
        d_expert=512,
        experts=32,
        top_k=8,
        work=work,
        tokens=tokens,
        dtype="bfloat16",
        heads=5,
        rank=8,
        peft_rank=28,
        parameters={"frozen": 0, "packed": 3_260_416, "peft": 3_211_264},
        seconds=made(**{"frozen": 10.0, "packed": 12.0, "peft": 30.0} | milliseconds),  # type: ignore[arg-type]
        profile={"frozen": {"aten::mm": 0.009}, "packed": {"aten::mm": 0.01}},
    )


def results(**changes: Any) -> Results:
    """A run with every section, in which some targets hold and some do not."""
    heads = made(frozen=10.0, packed_2=12.0, packed_4=12.1, packed_8=12.1, packed_16=12.2, loop_2=20.0, loop_16=90.0)
    training = {
        name: {"train": {"cpu": [seconds] * 3, "wall": [seconds] * 3}}
        for name, seconds in (("multiflora", 10.0), ("trl", 20.0))
    }
    fields: dict[str, Any] = {
        "command": "multiflora bench",
        "machine": machine(),
        "layers": (layer(0.1, packed=12.0), layer(0.0, packed=16.0)),
        "heads": (
            LayerCase(**LAYER | {"heads": 16, "rank": 2}, dropout=0.1, peft_rank=30, seconds=heads),  # type: ignore[arg-type]
        ),
        "memory": (
            MemoryCase(
                **{key: value for key, value in LAYER.items() if key != "tokens"},
                dropout=0.1,
                tokens=(64, 192),
                kept_bytes={"packed": (1064, 1192), "peft": (2000, 3000), "loop": (30_400, 90_000)},
            ),
        ),
        "shared": (
            SharedCase(
                model="SmolLM2-135M",
                layers="q + k",
                tokens=512,
                dtype="bfloat16",
                seconds=made(apart=4.0, together=5.0),
            ),  # type: ignore[arg-type]
        ),
        "experts": (experts("step", 512), experts("decode", 1), experts("forward", 512, packed=40.0)),
        "steps": (step(0.1), step(0.0)),
        "training": (
            TrainingCase(
                model="embedded",
                tasks=("sst2", "trec"),
                steps=4,
                batch_size=8,
                dtype="bfloat16",
                dropout=0.1,
                parameters={"multiflora": 8_000_000, "trl": 8_100_000},
                tokens=1000,
                seconds=training,  # type: ignore[arg-type]
            ),
        ),
        "serve": (serving(),),
        "generate": (generate(1), generate(16), generate(1, prompt=512, tokens=1)),
    }
    return Results(**fields | changes)
