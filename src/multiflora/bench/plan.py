"""What a benchmark runs: its cases in order, for each preset. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

from multiflora.bench.shapes import MIXTURE, SHAPES, Shape

__all__ = ["GENERATED_TASKS", "PRESETS", "SECTIONS", "TASKS", "Dtype", "Job", "Preset", "Section", "plan"]

Section = Literal["layer", "heads", "memory", "shared", "experts", "step", "train", "generate", "serve"]
SECTIONS: tuple[Section, ...] = get_args(Section)

Dtype = Literal["float32", "bfloat16"]

Preset = Literal["quick", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("quick", "standard", "full")
"""A few minutes (under five on a core without bfloat16), twenty-five, and three hours, on one core."""

TASKS = ("sst2", "trec", "agnews", "commonsenseqa")
"""Folders of four tasks with short answers."""
GENERATED_TASKS = ("rg_calendar_arithmetic", "rg_chain_sum", "rg_needle_haystack", "rg_number_filtering")
"""Stand in for them where there is no such folder: they need no file and no hub."""

_BY_NAME = {(shape.model, shape.layer): shape for shape in SHAPES}
_SMOLLM2, _QWEN, _LLAMA = "SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.1-8B"
_LAYERS = ("q_proj", "up_proj", "down_proj")
_DROPOUTS = (0.1, 0.0)
_PLAIN = ("frozen", "packed", "peft", "loop")
_TOKENS = (2048, 512)
"""A usual batch of a small model, and a small one, in which what is done once a layer counts four times as much."""


class Job(NamedTuple):
    """One case to measure."""

    section: Section
    settings: dict[str, Any]
    """Keyword arguments of the section's measure; a dtype by its name."""
    identity: dict[str, Any]
    """Fields of the result by which it is known again."""
    cost: float
    """Seconds it may take, roughly: for the progress bar."""

    @property
    def ticks(self) -> int:
        """How often it reports progress."""
        warm_up = {"experts": 1, "step": 1, "train": 1, "generate": 1, "serve": 1, "memory": 0}.get(self.section, 2)
        return int(self.settings.get("rounds", 0)) + warm_up


def plan(
    preset: Preset,
    *,
    kind: Literal["cpu", "cuda"],
    dtype: Dtype,
    compiler: bool,
    tasks: tuple[str, ...],
    only: Collection[Section] = (),
) -> list[Job]:
    """The jobs of a preset, the cheap sections first.

    Args:
        preset: How much.
        kind: A GPU gets long inputs; a processor gets few tokens of the large models.
        dtype: What models are trained in on this machine. Where bfloat16 is emulated that is float32: products would
            take eight times as long as float32's there, and nobody trains so.
        compiler: Whether ``torch.compile`` of the loop can take part.
        tasks: What `multiflora train` trains on.
        only: These sections; empty: all.

    Example:
        >>> jobs = plan("quick", kind="cpu", dtype="float32", compiler=False, tasks=TASKS, only=["memory"])
        >>> [job.section for job in jobs]
        ['memory', 'memory']
    """
    jobs = [
        *_memory(),
        *_heads(preset, kind, dtype),
        *_shared(preset, dtype),
        *_experts(preset, kind, dtype),
        *_layers(preset, kind, dtype, compiler),
        *_steps(preset, kind, dtype),
        *_training(preset, tasks),
        *_generate(preset, dtype),
        *_serve(preset, dtype),
    ]
    return [job for job in jobs if not only or job.section in only]


def _layers(preset: Preset, kind: str, dtype: Dtype, compiler: bool) -> list[Job]:
    if kind == "cuda":
        rounds = {"quick": 10, "standard": 30, "full": 60}[preset]
        shapes = [shape for shape in SHAPES if shape.model == _LLAMA or preset == "full"]
        return [
            _layer(shape, 8192, dtype, dropout, rounds, compiled=compiler) for shape in shapes for dropout in _DROPOUTS
        ]
    up = _BY_NAME[_SMOLLM2, "up_proj"]
    if preset == "quick":
        return [
            _layer(shape, 256, dtype, dropout, 7) for shape in (up, _BY_NAME[_QWEN, "up_proj"]) for dropout in _DROPOUTS
        ]
    types = dict.fromkeys(("float32", dtype))
    if preset == "full":
        return [
            _layer(shape, 1024, each, dropout, 21, compiled=compiler)
            for shape in SHAPES
            for each in types
            for dropout in _DROPOUTS
        ]
    few = dict.fromkeys(
        [
            *((_BY_NAME[_SMOLLM2, layer], tokens, each) for tokens in _TOKENS for layer in _LAYERS for each in types),
            *((_BY_NAME[_QWEN, layer], tokens, dtype) for tokens in _TOKENS for layer in _LAYERS),
            (_BY_NAME[_QWEN, "up_proj"], 512, "float32"),
            *((_BY_NAME[_LLAMA, layer], 256, dtype) for layer in _LAYERS),
            (_BY_NAME[_LLAMA, "q_proj"], 256, "float32"),
        ]
    )
    # compiling takes longer than measuring: one layer tells how the compiler does
    return [
        _layer(
            shape,
            tokens,
            each,
            dropout,
            15 if shape.model == _SMOLLM2 else 11,
            compiled=compiler and (shape, tokens, each) == (up, _TOKENS[0], dtype),
        )
        for shape, tokens, each in few
        for dropout in _DROPOUTS
    ]


def _layer(shape: Shape, tokens: int, dtype: str, dropout: float, rounds: int, *, compiled: bool = False) -> Job:
    names = (*_PLAIN, "compiled loop") if compiled else _PLAIN
    settings = {"tokens": tokens, "dtype": dtype, "dropout": dropout}
    return Job(
        "layer",
        {"shape": shape, **settings, "rounds": rounds, "names": names},
        {**shape._asdict(), **settings},
        # a frozen layer and its input gradient, five times over, with memory and profile on top; compiling
        5 * (rounds + 6) * _seconds(shape, tokens, dtype) + 40 * compiled,
    )


def _seconds(shape: Shape, tokens: int, dtype: str) -> float:
    return 1e-3 + 4 * tokens * shape.d_in * shape.d_out / (8e10 if dtype == "float32" else 1.8e11)


def _heads(preset: Preset, kind: str, dtype: Dtype) -> list[Job]:
    names = {
        "quick": [(_SMOLLM2, "up_proj")],
        "standard": [(_SMOLLM2, "up_proj"), (_QWEN, "up_proj")],
        "full": list(_BY_NAME),
    }[preset]
    rounds = {"quick": 9, "standard": 15, "full": 21}[preset]
    tokens = 8192 if kind == "cuda" else 256 if preset == "quick" else 512
    jobs = []
    for name in names:
        for dropout in _DROPOUTS:
            settings = {"tokens": tokens, "dtype": dtype, "dropout": dropout}
            cost = 8 * (rounds + 2) * _seconds(_BY_NAME[name], tokens, dtype)
            shape = _BY_NAME[name]
            jobs.append(
                Job("heads", {"shape": shape, **settings, "rounds": rounds}, {**shape._asdict(), **settings}, cost)
            )
    return jobs


def _memory() -> list[Job]:
    shape = _BY_NAME["Llama-2-7B", "up_proj"]
    jobs = []
    for dtype in ("float32", "bfloat16"):
        settings = {"tokens": (64, 192), "dtype": dtype, "dropout": 0.1}
        jobs.append(Job("memory", {"shape": shape, **settings}, {**shape._asdict(), **settings}, 3.0))
    return jobs


def _shared(preset: Preset, dtype: Dtype) -> list[Job]:
    groups = {_SMOLLM2: [("q_proj", 576), ("k_proj", 192), ("v_proj", 192)]}
    if preset != "quick":
        groups[_QWEN] = [("q_proj", 896), ("k_proj", 128), ("v_proj", 128)]
    width = {_SMOLLM2: 576, _QWEN: 896}
    jobs = []
    for model, parts in groups.items():
        layers = tuple(Shape(model, layer, width[model], d_out) for layer, d_out in parts)
        settings = {"tokens": 512, "dtype": dtype}
        jobs.append(Job("shared", {"layers": layers, **settings, "rounds": 21}, {"model": model, **settings}, 1.0))
    return jobs


def _experts(preset: Preset, kind: str, dtype: Dtype) -> list[Job]:
    rounds, many = {"quick": 3, "standard": 5, "full": 15}[preset], 8192 if kind == "cuda" else 512
    # a round of each in float32; peft's LoRA takes most of it
    works = (("decode", 1, 0.3), ("decode", 16, 0.5), ("forward", 16, 0.3), ("forward", many, 0.8), ("step", many, 1.6))
    jobs = []
    for each in dict.fromkeys((dtype,) if preset == "quick" else ("float32", dtype)):
        for work, tokens, seconds in works:
            settings = {"work": work, "tokens": tokens, "dtype": each}
            cost = 1.5 + (rounds + 2) * seconds / (1 if each == "float32" else 3)
            jobs.append(
                Job(
                    "experts",
                    {"mixture": MIXTURE, **settings, "rounds": rounds},
                    {**MIXTURE._asdict(), **settings},
                    cost,
                )
            )
    return jobs


def _steps(preset: Preset, kind: str, dtype: Dtype) -> list[Job]:
    rows, length, labels, rounds = {
        "quick": (1, 128, 16, 2),
        "standard": (8, 256, 32, 3),
        "full": (8, 256, 32, 11),
    }[preset]
    if kind == "cuda":
        rows, length, labels, rounds = 8, 1024, 64, {"quick": 5, "standard": 15, "full": 30}[preset]
    jobs = []
    for dropout in _DROPOUTS:
        settings = {"rows": rows, "length": length, "dtype": dtype, "dropout": dropout}
        cost = (0.05 if dtype == "float32" else 0.027) * rows * length * (rounds + 2)
        # with dropout a step keeps more, so that is where memory is looked at
        more = {"labels": labels, "rounds": rounds, "memory": dropout > 0}
        jobs.append(Job("step", {**settings, **more}, {"labels": labels, **settings}, cost))
    return jobs


def _training(preset: Preset, tasks: tuple[str, ...]) -> list[Job]:
    steps, rounds = {"quick": (2, 1), "standard": (4, 3), "full": (10, 5)}[preset]
    settings = {"model": "embedded", "steps": steps, "batch_size": 8, "dropout": 0.1}
    return [
        Job("train", {**settings, "tasks": tasks, "rounds": rounds}, settings, 15 + 7.5 * steps * (rounds + 1)),
    ]


def _generate(preset: Preset, dtype: Dtype) -> list[Job]:
    # one prompt tells most, in half a minute; a batch and a long prompt take thirteen competitors minutes
    tokens, rounds = {"quick": (4, 3), "standard": (8, 3), "full": (32, 15)}[preset]
    cases = ((1, 32), (16, 32), (1, 512)) if preset != "quick" else ((1, 32),)
    jobs = []
    for each in dict.fromkeys((dtype, "float32") if preset == "full" else (dtype,)):
        for batch, prompt in cases:
            settings = {"batch": batch, "prompt": prompt, "dtype": each}
            made = tokens if prompt == 32 else 1
            given = {**settings, "tokens": made, "rounds": rounds}
            # a token reads all weights, a prompt multiplies with them
            seconds = 0.05 * made + batch * prompt * 2.7e8 / (5e10 if each == "float32" else 2e11)
            jobs.append(Job("generate", given, settings, 10 + 13 * (rounds + 1) * seconds))
    return jobs


def _serve(preset: Preset, dtype: Dtype) -> list[Job]:
    tokens, requests, rounds = {"quick": (8, 100, 1), "standard": (32, 1000, 3), "full": (64, 1000, 7)}[preset]
    settings = {"clients": 16, "prompt": 32, "dtype": dtype}
    more = {"tokens": tokens, "requests": requests, "rounds": rounds}
    # two servers start; a token of 16 rows, five loads and the long answer; the short requests
    cost = 30 + 0.08 * (6 * tokens * (rounds + 1) + 512) / (1 if dtype == "float32" else 2) + 0.06 * requests
    return [Job("serve", {**settings, **more}, settings, cost)]
