r"""What a recipe would train and what it would take, without loading a weight.

The model is built from its config alone on torch's meta device, where tensors have shapes and no storage, and the
adapter is put into it there by peft, so the counts are those of the real run. Memory is the sum of five parts in bytes:

.. math::
    M = \underbrace{P b}_\text{weights} + \underbrace{4 a}_\text{adapter} + \underbrace{4 a}_\text{gradients}
        + \underbrace{8 a}_\text{AdamW's two moments} + \underbrace{A}_\text{activations}

P frozen parameters of b bytes each, a trainable ones in float32. What the backward pass keeps of a decoder layer is,
for each token of a forward pass, padding included,

.. math::
    A_\text{layer} = b\,(2 h + 2 q + 2 k + 4 f + R) + 8 h

h hidden, q and k the widths of queries and keys, f of the feed-forward part, R the summed ranks of a layer's branches:
two norms' outputs, queries, attention's output, keys and values, the four steps of a gated feed-forward part, what the
branches' heads read, and two norms' inputs in float32. With gradient checkpointing a layer keeps its input, b h, and
one layer at a time the rest. Logits exist only where there is loss: for each of those positions one row of the
vocabulary in b bytes, in float32 and as a float32 gradient.

peft's LoRA beside half-precision weights keeps a copy of the input for each adapted module, which is added. The formula
is that of a Llama with fused attention (no T x T scores are kept); other models differ by some ten percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from multiflora.data.batches import fold
from multiflora.machine import size_words
from multiflora.methods.baselines import tokens_in_front, virtual_tokens
from multiflora.methods.fused import by_layer

if TYPE_CHECKING:
    from rich.console import Group

    from multiflora.recipe import Recipe

__all__ = [
    "Estimate",
    "Memory",
    "activation_bytes",
    "adapted_modules",
    "count_parameters",
    "estimate",
    "memory_of",
]


@dataclass(frozen=True)
class Memory:
    """Bytes on the device while training; see the module's formula."""

    weights: int
    """The frozen model."""
    adapter: int
    """Its trainable parameters and frozen buffers, in float32."""
    gradients: int
    """One for each trainable parameter, in float32."""
    optimizer: int
    """AdamW's two moments, in float32."""
    activations: int
    """What the backward pass keeps of the largest forward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Estimate:
    """What a recipe would train and what it would take."""

    modules: dict[str, int]
    """Adapted modules by name, the layer's number written ``*``, and how many of each."""
    trainable: int
    """Parameters that would be trained."""
    parameters: int
    """All parameters, the adapter's included."""
    steps: int
    """Optimiser steps."""
    tokens_per_step: float
    """Tokens that a step reads or writes, the mean over the run; padding is not counted, answers at their longest."""
    loss_tokens_per_step: float
    """Those of them that carry loss."""
    objective: str
    """What a step learns from: its answers, or pairs; a few words."""
    memory: Memory
    """Bytes while training."""
    mixture: dict[str, dict[str, Any]]
    """What each task gives to the run, see `multiflora.data.mixture.Mixture.report`."""
    notes: tuple[str, ...]
    """What is left out, a sentence each."""
    scores: dict[str, str]
    """Task -> how it is scored and why, a sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}

    def report(self) -> Group:
        """Everything for a person, as a rich renderable."""
        from rich.console import Group
        from rich.text import Text

        from multiflora.data.table import mixture_table
        from multiflora.text_table import TextTable

        facts = TextTable("", "", show_header=False)
        share = f"{self.trainable / self.parameters:.3%} of {self.parameters:,}"
        modules = "\n".join(f"{count} x {name}" for name, count in self.modules.items())
        facts.add_row("adapted modules", Text(modules or "none"))
        facts.add_row("trainable parameters", f"{self.trainable:,} ({share})")
        facts.add_row("objective", self.objective)
        facts.add_row("optimiser steps", f"{self.steps:,}")
        facts.add_row("tokens per step", f"{self.tokens_per_step:,.0f}, {self.loss_tokens_per_step:,.0f} with loss")
        parts = ", ".join(f"{name} {size_words(count)}" for name, count in asdict(self.memory).items())
        facts.add_row("memory", f"about {size_words(self.memory.total)}: {parts}")
        told = (*self.notes, *self.scores.values())
        return Group(facts, *(Text(note) for note in told), mixture_table(self.mixture))


def estimate(recipe: Recipe) -> Estimate:
    """Say what a recipe would train and what it would take; the tasks are read in full, the model's weights are not.

    Args:
        recipe: The recipe.

    Raises:
        MultifloraError: Whatever would stop the run before it trains: in the tasks, the model or the method.

    Example:
        >>> estimate(load_recipe("recipe.yaml")).trainable  # doctest: +SKIP
        2580480
    """
    from multiflora.base_model import load_tokenizer
    from multiflora.data.prepare import encode_tasks
    from multiflora.files import check_writable
    from multiflora.jobs.lorahub import check_lorahub, steps_of_tasks
    from multiflora.tasks.kind import explain
    from multiflora.training.adapter import adapted_on_meta, adapter_config, notes_on
    from multiflora.training.baselines import adalora_steps
    from multiflora.training.course import check_course
    from multiflora.training.fit import order_examples
    from multiflora.training.init_from import check_earlier

    adapter_config(recipe)  # the cheapest of the checks go first
    if recipe.method.name == "lorahub":
        check_lorahub(recipe)
    check_writable(recipe.output)
    check_course(recipe)
    tokenizer, model = load_tokenizer(recipe.model), adapted_on_meta(recipe)
    check_earlier(model, recipe)
    examples = encode_tasks(recipe, tokenizer, _base_of(model).config, taken=virtual_tokens(model))
    data, steps = order_examples(recipe, examples)
    if recipe.method.name == "adalora":
        adalora_steps(recipe.method.settings, steps)  # the run would be refused where it is too short for them
    if recipe.method.name == "lorahub":
        steps_of_tasks(examples.mixture, steps)
    trainable, parameters = count_parameters(model)
    tokens, loss_tokens = _tokens(recipe, data.dataset)
    activations = max(
        activation_bytes(
            model, rows=rows, length=length, loss_tokens=loss, checkpointing=recipe.train.gradient_checkpointing
        )
        for rows, length, loss in _batches(recipe, data.dataset)
    )
    return Estimate(
        modules=adapted_modules(model),
        trainable=trainable,
        parameters=parameters,
        steps=steps,
        tokens_per_step=tokens / steps,
        loss_tokens_per_step=loss_tokens / steps,
        objective=_objective_words(recipe),
        memory=memory_of(model, activations=activations),
        mixture=data.report,
        notes=(*notes_on(model, recipe), *examples.notes),
        scores=explain((*recipe.tasks, *recipe.evaluate.extra_tasks)),
    )


def _tokens(recipe: Recipe, dataset: Any) -> tuple[int, int]:
    """Tokens of all steps, and those with loss; of answers that are still to be written, at their longest."""
    grpo, columns = recipe.train.grpo, dataset.with_format("numpy")
    tokens, loss_tokens = int(columns["length"][:].sum()), int(columns["loss_tokens"][:].sum())
    if recipe.train.dpo is not None:  # of each pair, `length` is the longer one's
        tokens = sum(len(ids) for name in ("input_ids", "rejected_ids") for ids in dataset[name])
    if grpo is not None:
        loss_tokens = len(dataset) * grpo.num_generations * grpo.max_completion_length
        tokens = tokens * grpo.num_generations + loss_tokens
    return tokens, loss_tokens


def _objective_words(recipe: Recipe) -> str:
    """What a step learns from.

    Example:
        >>> _objective_words(recipe)  # doctest: +SKIP
        'grpo: 24 answers in a step, 8 to each of 3 prompts, each of at most 64 tokens'
    """
    train, rows = recipe.train, recipe.train.batch_size * recipe.train.gradient_accumulation
    if train.grpo is not None:
        answers, longest = train.grpo.num_generations, train.grpo.max_completion_length
        return (
            f"grpo: {rows:,} answers in a step, {answers:,} to each of {rows // answers:,} prompts, each of at most "
            f"{longest:,} tokens"
        )
    return f"{train.objective}: {rows:,} {'pairs' if train.dpo is not None else 'examples'} in a step"


def _batches(recipe: Recipe, dataset: Any) -> Iterator[tuple[int, int, int]]:
    """Rows, row length and positions with loss of every forward pass of the run."""
    columns = dataset.select_columns(["length", "loss_tokens"]).with_format("numpy")[:]
    size = recipe.train.batch_size
    if recipe.train.grpo is not None:  # which prompts come together is known only when they are drawn
        answer = recipe.train.grpo.max_completion_length
        yield size, int(columns["length"].max()) + answer, size * answer
        return
    for start in range(0, len(dataset), size):
        lengths = [int(n) for n in columns["length"][start : start + size]]
        loss = int(columns["loss_tokens"][start : start + size].sum())
        rows = fold(lengths, recipe.train.max_length) if recipe.train.packing else [[i] for i in range(len(lengths))]
        pairs = 1 if recipe.train.dpo is None else 2
        yield pairs * len(rows), max(sum(lengths[i] for i in row) for row in rows), loss


def adapted_modules(model: Any) -> dict[str, int]:
    """Count the adapted modules and parameters of a peft model by name, the layer's number written ``*``.

    Example:
        >>> adapted_modules(model)  # doctest: +SKIP
        {'model.layers.*.self_attn.q_proj': 30, 'model.layers.*.self_attn.v_proj': 30}
    """
    return by_layer(_adapted_names(model))


def _adapted_names(model: Any) -> list[str]:
    """The modules and parameters with an adapter: none where a prompt is learned or the model itself is trained."""
    if not hasattr(model, "get_base_model") or virtual_tokens(model):
        return []
    return [*model.base_model.targeted_module_names, *model.base_model.targeted_parameter_names]


def _adapted_layers(model: Any) -> list[Any]:
    """What stands in their place; peft's LoRA has no place of its own for each parameter of a module."""
    modules = dict(model.get_base_model().named_modules()) if hasattr(model, "get_base_model") else {}
    return [modules[name] for name in _adapted_names(model) if hasattr(modules.get(name), "get_base_layer")]


def _base_of(model: Any) -> Any:
    """The model without what peft has put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_parameters(model: Any) -> tuple[int, int]:
    """Count the trainable parameters of a model, and all of them."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def activation_bytes(model: Any, *, rows: int, length: int, loss_tokens: int, checkpointing: bool = False) -> int:
    """Count what the backward pass keeps of one forward pass, by the module's formula.

    Args:
        model: A peft model, or one that is trained whole; only its config, types and shapes are looked at.
        rows: Rows in the batch.
        length: Tokens in a row, padding included.
        loss_tokens: Positions of the batch that carry loss.
        checkpointing: Whether layers are computed again in the backward pass.
    """
    base = _base_of(model)
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = config.hidden_size
    queries = heads * (getattr(config, "head_dim", None) or width // heads)
    keys = queries * (getattr(config, "num_key_value_heads", None) or heads) // heads
    feed_forward = getattr(config, "intermediate_size", None) or 4 * width
    layers, size = config.num_hidden_layers, base.dtype.itemsize
    ranks, inputs = _widths(model)
    inside = size * (2 * width + 2 * queries + 2 * keys + 4 * feed_forward + ranks // layers) + 8 * width
    if size < 4 and getattr(model, "peft_type", None) in (
        "LORA",
        "ADALORA",
    ):  # each module's own copy, instead of what modules share
        inside += max(size * (inputs // layers - 2 * width - feed_forward), 0)
    tokens = rows * (length + tokens_in_front(model))
    body = tokens * (layers * size * width + inside if checkpointing else layers * inside)
    return int(body + loss_tokens * config.vocab_size * (size + 8))


def _widths(model: Any) -> tuple[int, int]:
    """Sums over the adapted layers: rows of trained matrices that read the input (ranks, router heads), and d_in."""
    ranks = inputs = 0
    for layer in _adapted_layers(model):
        d_in = getattr(layer.get_base_layer(), "in_features", 0)
        # a token is read by each of the experts that were chosen for it
        times = getattr(_base_of(model).config.get_text_config(), "num_experts_per_tok", 1) if _is_fused(layer) else 1
        inputs += times * d_in
        read = [p for p in layer.parameters() if p.requires_grad and p.dim() > 1 and p.shape[-1] == d_in]
        ranks += times * sum(p.shape[-2] for p in read if p.dim() == (3 if _is_fused(layer) else 2))
    return ranks, inputs


def memory_of(model: Any, *, activations: int) -> Memory:
    """Add up the five parts for a model on any device, the meta device too; one trained whole has no adapter."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    ours = {id(t) for layer in _adapted_layers(model) for t in _added(layer)}
    if hasattr(model, "get_base_model"):
        ours |= trained
    sizes = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    gradients = sum(size for key, size in sizes.items() if key in trained)
    adapter = sum(size for key, size in sizes.items() if key in ours)
    return Memory(
        weights=sum(sizes.values()) - adapter,
        adapter=adapter,
        gradients=gradients,
        optimizer=2 * gradients,
        activations=activations,
    )


def _is_fused(layer: Any) -> bool:
    """Whether a layer is a mixture's experts."""
    return hasattr(layer.get_base_layer(), "num_experts")


def _added(layer: Any) -> list[Any]:
    """The tensors that the adapter added to one layer."""
    base = {id(t) for t in (*layer.get_base_layer().parameters(), *layer.get_base_layer().buffers())}
    return [t for t in (*layer.parameters(), *layer.buffers()) if id(t) not in base]
