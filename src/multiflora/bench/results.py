"""What a benchmark run writes: every sample, and enough about the machine to read them. Torch-free.

The file holds samples and no ratios: reports and verdicts are made from it, so they can be made anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from multiflora.errors import DataError
from multiflora.files import saving, write_text

__all__ = [
    "Clock",
    "ExpertsCase",
    "ExpertsWork",
    "GenerateCase",
    "LayerCase",
    "Machine",
    "MemoryCase",
    "Profile",
    "Results",
    "Samples",
    "ServeCase",
    "SharedCase",
    "StepCase",
    "TrainingCase",
    "load",
    "save",
]

Clock = Literal["wall", "cpu"]
Seconds = Annotated[float, AfterValidator(lambda value: round(value, 7))]
"""To a tenth of a microsecond: finer than any clock, and a file of hundreds of kilobytes less."""
Samples = dict[str, dict[str, dict[Clock, list[Seconds]]]]
"""Seconds by competitor, phase and clock; the i-th samples of all competitors are of the same round."""
Profile = dict[str, dict[str, Seconds]]
"""Seconds of one run by competitor and operator, what an operator calls not counted in; the largest only."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Frozen):
    """Where the numbers were taken."""

    kind: Literal["cpu", "cuda"]
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
    profile: Profile = {}

    @property
    def name(self) -> str:
        """The case in words."""
        return (
            f"{self.model} {self.layer} {self.d_in}→{self.d_out}, {self.tokens} tokens, {self.dtype}, "
            f"dropout {self.dropout:g}, {self.heads} heads of rank {self.rank}"
        )


class MemoryCase(_Frozen):
    """What a layer keeps for its backward pass, for two numbers of tokens: what grows with them and what does not."""

    model: str
    layer: str
    d_in: int
    d_out: int
    dtype: str
    dropout: float
    heads: int
    rank: int
    tokens: tuple[int, int]
    kept_bytes: dict[str, tuple[int, int]]
    """By competitor, beyond the layer's input and all weights."""

    @property
    def name(self) -> str:
        """The case in words."""
        return (
            f"{self.model} {self.layer} {self.d_in}→{self.d_out}, {self.dtype}, dropout {self.dropout:g}, "
            f"{self.heads} heads of rank {self.rank}"
        )

    def per_token(self, competitor: str) -> float:
        """Bytes a token."""
        (few, many), (less, more) = self.tokens, self.kept_bytes[competitor]
        return (more - less) / (many - few)

    def constant(self, competitor: str) -> float:
        """Bytes that do not grow with the tokens: copies of adapter weights, joined or cast."""
        return self.kept_bytes[competitor][0] - self.tokens[0] * self.per_token(competitor)


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
    """Phases forward, backward and update. "products" is R-LoRA's practical floor, its products of all layers alone;
    "multilora products" is MultiLoRA's."""
    peak_bytes: dict[str, int] = {}
    flops: float = 0.0
    """What R-LoRA's packed products have to compute in all layers, forward and backward."""
    bytes: float = 0.0
    """What they have to move."""
    profile: Profile = {}

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.rows} × {self.length} tokens, {self.dtype}, dropout {self.dropout:g}"


class TrainingCase(_Frozen):
    """`multiflora train` and plain trl side by side on the same examples, weights and adapter size."""

    model: str
    tasks: tuple[str, ...]
    steps: int
    batch_size: int
    dtype: str
    dropout: float
    parameters: dict[str, int]
    tokens: int
    """Tokens that each of the two reads in one run, padding not counted."""
    seconds: Samples
    """Competitors "multiflora" and "trl"; phase train."""

    @property
    def name(self) -> str:
        """The case in words."""
        return (
            f"{self.model} on {', '.join(self.tasks)}, {self.steps} steps of {self.batch_size} examples, {self.dtype}, "
            f"dropout {self.dropout:g}"
        )


class GenerateCase(_Frozen):
    """Prefill of a prompt and greedy decoding of a whole model, with each method's adapter on all linear layers."""

    model: str
    batch: int
    """Rows."""
    prompt: int
    """Tokens of each."""
    tokens: int
    """Generated."""
    dtype: str
    parameters: dict[str, int]
    """Of each adapter."""
    seconds: Samples
    """Phases prefill and decode. "products" is the practical floor: R-LoRA's two products of all layers alone."""
    profile: Profile = {}
    """Of one round of the base model's and of R-LoRA's."""

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.dtype}, batch {self.batch}, prompt of {self.prompt}"


class ServeCase(_Frozen):
    """Clients of a server on this machine: loads that come and are answered, and what the server holds."""

    model: str
    clients: int
    """That ask at once; in the load "base, 1 client" there is one."""
    prompt: int
    """Tokens of each."""
    tokens: int
    """Of each answer."""
    dtype: str
    written: dict[str, int]
    """Tokens of all answers of each load."""
    seconds: Samples
    """Loads "base, 1 client", "base", "rlora", "mixed" (the base and four adapters) and, where it runs, "transformers
    serve" (the base); phase answers. The processor's clock is the server's own."""
    first_tokens: list[int]
    """Tokens of an answer of 512 that came between a short request and its first token, of each short request."""
    requests: int
    """Over which memory was watched."""
    memory: list[int]
    """Bytes that the server held after each twentieth of them."""
    left_out: str = ""
    """Why `transformers serve` was not measured."""

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.dtype}, {self.clients} clients, prompts of {self.prompt}, {self.tokens} tokens"

    def speeds(self, load: str, clock: Clock = "wall") -> list[float]:
        """Tokens per second of a load, in each round."""
        return [self.written[load] / seconds for seconds in self.seconds[load]["answers"][clock]]

    @property
    def growth(self) -> float:
        """Most memory in the second half of the requests over the least there."""
        half = self.memory[len(self.memory) // 2 :]
        return max(half) / min(half)


class SharedCase(_Frozen):
    """Stems of layers that read the same input: one product for each layer, or one for all."""

    model: str
    layers: str
    tokens: int
    dtype: str
    seconds: Samples
    """Competitors "apart" and "together"; phases forward and backward."""

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model} {self.layers}, {self.tokens} tokens, {self.dtype}"


ExpertsWork = Literal["step", "forward", "decode"]
"""A forward and a backward pass; a forward pass without gradients that starts anew; one that goes on with a cache."""


class ExpertsCase(_Frozen):
    """A mixture's fused experts, all competitors."""

    model: str
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    """Experts of a token."""
    work: ExpertsWork
    tokens: int
    dtype: str
    heads: int
    rank: int
    peft_rank: int
    """Rank of peft's LoRA with as many parameters."""
    parameters: dict[str, int]
    """Trainable parameters of each competitor."""
    seconds: Samples
    """Phases forward and, of a step, backward."""
    profile: Profile = {}

    @property
    def name(self) -> str:
        """The case in words."""
        work = {"step": "training step", "forward": "forward", "decode": "decoding"}[self.work]
        return f"{self.model}, {work} of {self.tokens} token{'s' * (self.tokens != 1)}, {self.dtype}"


class Results(_Frozen):
    """One run of the benchmark."""

    format: Literal[1] = 1
    command: str
    machine: Machine
    layers: tuple[LayerCase, ...] = ()
    heads: tuple[LayerCase, ...] = ()
    """Competitors are "frozen", "packed N" and "loop N" for N heads, all of one total rank."""
    memory: tuple[MemoryCase, ...] = ()
    shared: tuple[SharedCase, ...] = ()
    experts: tuple[ExpertsCase, ...] = ()
    steps: tuple[StepCase, ...] = ()
    training: tuple[TrainingCase, ...] = ()
    generate: tuple[GenerateCase, ...] = ()
    serve: tuple[ServeCase, ...] = ()

    @property
    def clock(self) -> Clock:
        """The clock that ratios are read from: of one thread on a processor, its own time; else the wall's."""
        return "cpu" if self.machine.threads == 1 and self.machine.kind == "cpu" else "wall"


def save(results: Results, path: Path) -> None:
    """Write the results as JSON, whole or not at all.

    Raises:
        EnvironmentProblem: The system refuses.
    """
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, results.model_dump_json() + "\n")


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
