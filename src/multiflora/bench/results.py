"""What a benchmark run writes: every sample, and enough about the machine to read them. Torch-free.

The file holds samples and no ratios: reports and verdicts are made from it, so they can be made anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from multiflora.errors import DataError

__all__ = [
    "Clock",
    "LayerCase",
    "Machine",
    "Results",
    "Samples",
    "SharedCase",
    "StepCase",
    "TrainingCase",
    "load",
    "save",
]

Clock = Literal["wall", "cpu"]
Samples = dict[str, dict[str, dict[Clock, list[float]]]]
"""Seconds by competitor, phase and clock; the i-th samples of all competitors are of the same round."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Frozen):
    """Where the numbers were taken."""

    device: str
    """The processor's or the GPU's name."""
    cores: int
    threads: int
    """Threads torch computed with."""
    native_bf16: bool
    """Whether it multiplies in bfloat16 without emulation."""
    versions: dict[str, str]
    """Of Python, torch, peft, transformers, trl and Multiflora."""
    gemm_rate: dict[str, float]
    """FLOP a second of one large product, by number type."""
    copy_rate: float
    """Bytes a second read plus written by a large copy."""


class LayerCase(_Frozen):
    """One layer, all competitors."""

    model: str
    layer: str
    d_in: int
    d_out: int
    tokens: int
    dtype: str
    dropout: float
    heads: int
    rank: int
    peft_rank: int
    """Rank of the plain LoRA with as many parameters."""
    seconds: Samples
    """Phases forward and backward. "products" is the practical floor: the six products of the packed op alone."""
    kept_bytes: dict[str, int] = {}
    """Activations a competitor keeps for its backward pass, beyond the layer's input and all weights."""
    peak_bytes: dict[str, int] = {}
    """Most memory in use at once during forward and backward, beyond what was there before."""
    flops: float = 0.0
    """What the packed op's six products have to compute, forward and backward."""
    bytes: float = 0.0
    """What they have to move."""

    @property
    def name(self) -> str:
        """The case in words."""
        return (
            f"{self.model} {self.layer} {self.d_in}→{self.d_out}, {self.tokens} tokens, {self.dtype}, "
            f"dropout {self.dropout:g}, {self.heads} heads of rank {self.rank}"
        )


class StepCase(_Frozen):
    """One training step of a whole model: forward, loss on the last positions of each row, backward, AdamW."""

    model: str
    rows: int
    length: int
    labels: int
    """Positions with loss in each row."""
    dtype: str
    dropout: float
    parameters: dict[str, int]
    """Trainable parameters of each competitor."""
    seconds: Samples
    """Phases forward, backward and update."""
    peak_bytes: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.rows} × {self.length} tokens, {self.dtype}, dropout {self.dropout:g}"


class TrainingCase(_Frozen):
    """`multiflora train` and plain trl side by side on the same tasks, weights and adapter size."""

    model: str
    tasks: tuple[str, ...]
    batch_size: int
    dtype: str
    parameters: dict[str, int]
    tokens_per_second: dict[str, list[float]]
    """Tokens read a second (without padding), one number a run."""


class SharedCase(_Frozen):
    """Stems of layers that read the same input: one product for each layer, or one for all."""

    model: str
    layers: str
    tokens: int
    dtype: str
    seconds: Samples
    """Competitors "apart" and "together"; phases forward and backward."""


class Results(_Frozen):
    """One run of the benchmark."""

    format: Literal[1] = 1
    command: str
    machine: Machine
    layers: tuple[LayerCase, ...] = ()
    heads: tuple[LayerCase, ...] = ()
    """Competitors are "frozen" and "N heads", all of one total rank."""
    steps: tuple[StepCase, ...] = ()
    training: Annotated[tuple[TrainingCase, ...], Field(default=())]
    shared: tuple[SharedCase, ...] = ()


def save(results: Results, path: Path) -> None:
    """Write the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Results:
    """Read what :func:`save` wrote.

    Raises:
        DataError: The file is absent or is no benchmark result of this format.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Give a file `multiflora bench` wrote.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(word) for word in first["loc"]) or "the whole file"
        raise DataError(
            f"{path} is no result of `multiflora bench`: {place}: {first['msg']}. Run the benchmark again, or give "
            "another file."
        ) from error
