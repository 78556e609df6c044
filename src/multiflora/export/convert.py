"""``multiflora.to_lora``: any adapter here as plain LoRA that stock peft and every server load. The whole story."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multiflora.context import task as task_of
from multiflora.errors import ExportError
from multiflora.export.exact import exact_pairs
from multiflora.export.experts import check_experts, expert_pairs, scaled, task_scales
from multiflora.export.low_rank import truncate
from multiflora.export.plain import Pair, read_config, read_lora, write_lora
from multiflora.export.report import AdapterReport, LayerReport, Report
from multiflora.export.same import base_or_warning, check_logits, logits_of, put_in, with_pairs
from multiflora.export.saved import SavedAdapter, method_of, open_adapter
from multiflora.export.source import adapter_folder, base_name, load_adapted, load_tokenizer_of, put_on
from multiflora.export.stage import check_free, staged
from multiflora.files import user_path, write_json
from multiflora.task_ids import index_of

__all__ = ["check_options", "to_lora"]

log = logging.getLogger(__name__)


def to_lora(
    model: Any,
    folder: str | Path,
    *,
    task: str | int | None = None,
    per_task: bool = False,
    per_expert: bool = False,
    calibration: str | Path | Sequence[Any] | None = None,
    fit: bool = False,
    rank: int | None = None,
    base: str | Path | None = None,
    tokenizer: Any = None,
    limit: int | None = 64,
) -> Report:
    r"""Write an adapter as plain LoRA, which loads where multiflora is not installed.

    =====================  ==========================================================================================
    MultiLoRA, M-LoRA      exact: the factors, stacked, are the LoRA's factors (rank n r; r, or 2 r with the offset)
    MOELoRA, MTL-LoRA      exact, one adapter for each task, in ``folder/TASK``; or for ``task`` alone, in ``folder``
    HydraLoRA, R-LoRA,     approximate: their router reads the input, so each head gets its mean gate over calibration
    LoRAMoE                examples, or B' is fitted to the layer's output on them; the error is reported
    =====================  ==========================================================================================

    From a folder, exact methods are converted layer by layer. What is written is read back by peft and must give the
    adapter's logits on the base model before this returns (where that is not named or not at hand, a warning says so,
    and exact methods are compared layer by layer); ``folder`` appears whole or not at all. ``report.json`` beside the
    adapters holds every layer's numbers.

    Args:
        model: A model with one active adapter, or the folder an adapter was saved to.
        folder: Where the result goes; it must not hold anything yet.
        task: Name or id of the one task to convert for. For routed methods: calibrate on its examples only.
        per_task: For routed methods: one adapter for each task of the calibration examples.
        per_expert: For MOELoRA with its gate shared by all layers: one adapter for each expert, in ``folder/expert-0``
            and so on. Each task's update is their sum by the report's ``scales``, exactly.
        calibration: For routed methods: a file of examples, a recipe or run folder, or rows in memory
            (see `multiflora.export.examples.read_examples`).
        fit: Minimise the error of each layer's output instead of averaging the gate: least squares in closed form.
        rank: Cut every layer to this rank: by exact SVD of the factors, or, with ``fit``, where the calibration
            inputs miss it least.
        base: The base model's folder or hub id, where calibration needs it and the adapter names none.
        tokenizer: Of a model in memory, for calibration examples that are text.
        limit: Examples taken from a file, or from each task of a recipe; None: all.

    Returns:
        What was written: for each adapter whether it is exact, its layers' ranks and errors.

    Raises:
        ExportError: Calibration is missing or not needed, a file is damaged, or the check of the result failed.
        AdapterError: There is no such task.

    Example:
        >>> report = multiflora.to_lora("runs/mlora", "runs/mlora-plain")  # doctest: +SKIP
        >>> report.exact  # doctest: +SKIP
        True
    """
    output = user_path(folder)
    if rank is not None and rank < 1:
        raise ExportError(f"rank is {rank}; expected a whole number of at least 1.")
    check_free(output)
    with adapter_folder(model) as source:
        config = read_config(source)
        method = method_of(config)
        if per_expert:
            check_experts(source, config)
        calibrated = check_options(source, config, calibration, fit, per_task)
        scales: dict[str, tuple[float, ...]] = {}
        if method is None:
            jobs: Iterator[_Job] = iter([_plain_job(source, rank)])
        elif calibrated:
            assert calibration is not None
            examples = _Calibration(model, source, calibration, base, tokenizer, limit)
            jobs = _routed_jobs(open_adapter(source), examples, task, per_task, fit, rank)
        elif per_expert:
            opened = open_adapter(source)
            scales = _scales(opened, task)
            jobs = _expert_jobs(opened, rank)
        else:
            jobs = _exact_jobs(open_adapter(source), task, rank)
        compared = _Compared(model, source, base, config, task)
        with staged(output) as scratch:
            adapters = [_write(job, scratch, config, compared) for job in jobs]
            compared.check_sums(scratch, adapters, scales)
            how = "exact" if not calibrated else "fit" if fit else "mean gate"
            report = Report(getattr(config, "method_name", "lora"), how, output, tuple(adapters), scales)
            write_json(scratch / "report.json", report.to_dict())
    log.info("%d plain LoRA written to %s and read back", len(adapters), output)
    return report


@dataclass(frozen=True)
class _Job:
    """One plain LoRA to be written."""

    folder: str
    task: str | None
    exact: bool
    layers: Iterator[tuple[Pair, LayerReport]]
    extras: Mapping[str, Any]


def check_options(
    source: Path, config: Any, calibration: Any = None, fit: bool = False, per_task: bool = False
) -> bool:
    """Refuse what is missing, and what would be without effect; say whether the adapter needs calibration."""
    method = method_of(config)
    calibrated = method is not None and method.merges() == "no"
    name = getattr(config, "method_name", None) or "LoRA"
    if calibrated and calibration is None:
        raise ExportError(
            f"{source} is a {name} adapter: its router reads the input, so plain LoRA can only approximate it, and "
            "nothing says on which inputs. Give calibration examples: --calibration FILE.jsonl (rows with text, or "
            "prompt and completion; a hundred are plenty), or a recipe, or the run's own folder."
        )
    if calibrated and method is not None and method.needs_task():
        raise ExportError(
            f"{source} is a {name} adapter that is routed by token and depends on the task, too: neither one plain "
            "LoRA nor one for each task comes near. Serve the adapter itself with `multiflora serve`."
        )
    if not calibrated and (calibration is not None or fit or per_task):
        given = "calibration" if calibration is not None else "fit" if fit else "per_task"
        raise ExportError(f"{source} is a {name} adapter, which converts exactly; leave {given} out.")
    return calibrated


class _Compared:
    """What was written, compared with the adapter by the logits of the whole model, where the base model is at hand."""

    def __init__(self, model: Any, source: Path, base: str | Path | None, config: Any, task: str | int | None) -> None:
        self.source, self.base, self.model = source, base, model
        self.dtype: Any = "auto"
        self.is_at_hand, self.expected = True, dict[str | None, Tensor]()
        method = method_of(config)
        if method is not None and method.merges() == "no":
            return  # it can only be approximated: see `check`
        for self.dtype in ("auto", torch.float32):  # a large update may be more than the base model's type can hold
            bare = self._bare()
            if bare is None:
                return
            self.expected = _logits_by_task(put_on(bare, source, may_untie=True), config, task)
            if all(logits.isfinite().all() for logits in self.expected.values()):
                return

    def _bare(self) -> Any:
        """The base model, loaded; or a copy of the one in memory without its adapter."""
        if hasattr(self.model, "unload"):
            bare = copy.deepcopy(self.model).unload().eval()
            return bare if self.dtype == "auto" else bare.to(self.dtype)
        bare = base_or_warning(self.source, self.base, "The plain LoRA", self.dtype) if self.is_at_hand else None
        self.is_at_hand = bare is not None
        return bare

    def check(self, folder: Path, job: _Job, pairs: Sequence[Pair], is_whole: bool) -> None:
        """Read a LoRA back as peft does, and compare: with the adapter, or with the update it could only approximate.

        Raises:
            ExportError: They differ.
        """
        expected = self.expected.get(job.task if job.task in self.expected else None) if is_whole else None
        model = self._bare() if expected is None and self.is_at_hand else None
        if not self.is_at_hand:
            return
        if expected is None:
            put_in(model, job.extras, self.source, read_lora(folder).config)
            with with_pairs(model, pairs):
                expected = logits_of(model)
            del model
        found = logits_of(put_on(self._bare(), folder, may_untie=True))
        check_logits(found, expected, f"The plain LoRA made from {self.source}")

    def check_sums(
        self, folder: Path, adapters: Sequence[AdapterReport], scales: Mapping[str, Sequence[float]]
    ) -> None:
        """Read whole experts back, and compare each task's scaled sum of them with the adapter.

        Raises:
            ExportError: They differ.
        """
        if not scales or not self.is_at_hand or not all(made.exact for made in adapters):
            return
        experts, model = [list(read_lora(folder / made.folder).pairs()) for made in adapters], self._bare()
        for task, row in scales.items():
            with with_pairs(model, scaled(experts, row)):
                found = logits_of(model)
            check_logits(found, self.expected[task], f"The sum of experts for {task}, made from {self.source},")


def _logits_by_task(adapted: Any, config: Any, task: str | int | None) -> dict[str | None, Tensor]:
    """The adapter's logits: for each task, or for the one given, where they depend on it; else once, under None."""
    method = method_of(config)
    if method is None or not method.needs_task():
        return {None: logits_of(adapted)}
    names, found = _names(config), dict[str | None, Tensor]()
    for index in range(len(names)) if task is None else [index_of(config, task)]:
        with task_of(adapted, index):
            found[names[index]] = logits_of(adapted)
    return found


def _write(job: _Job, folder: Path, config: Any, compared: _Compared) -> AdapterReport:
    pairs, reports = [], []
    for pair, report in job.layers:
        pairs.append(pair)
        reports.append(report)
    write_lora(folder / job.folder, pairs, config, job.extras)
    whole = all(report.energy_lost < 1e-12 for report in reports)
    compared.check(folder / job.folder, job, pairs, job.exact and whole)
    return AdapterReport(job.folder, job.task, job.exact and whole, tuple(reports))


def _cut(pairs: Iterator[Pair], rank: int | None) -> Iterator[tuple[Pair, LayerReport]]:
    """Cut exact pairs to a rank, where one is given."""
    for pair in pairs:
        lost = 0.0
        if rank is not None and rank < pair.A.shape[0]:
            A, B, lost = truncate(pair.A, pair.B, rank)
            pair = Pair(pair.name, A, B)
        yield pair, LayerReport(pair.name, pair.A.shape[0], lost**0.5, None, lost)


def _plain_job(source: Path, rank: int | None) -> _Job:
    lora = read_lora(source)
    return _Job("", None, True, _cut(lora.pairs(), rank), lora.extras())


def _exact_jobs(adapter: SavedAdapter, task: str | int | None, rank: int | None) -> Iterator[_Job]:
    config, extras = adapter.config, adapter.extras()
    if not adapter.method.needs_task():
        yield _Job("", None, True, _cut(exact_pairs(adapter, None), rank), extras)
    elif task is not None:
        index = index_of(config, task)
        yield _Job("", _names(config)[index], True, _cut(exact_pairs(adapter, index), rank), extras)
    else:
        for index, (name, place) in enumerate(_places(_names(config)).items()):
            yield _Job(place, name, True, _cut(exact_pairs(adapter, index), rank), extras)


def _expert_jobs(adapter: SavedAdapter, rank: int | None) -> Iterator[_Job]:
    for expert in range(adapter.method.heads(adapter.config)):
        yield _Job(f"expert-{expert}", None, True, _cut(expert_pairs(adapter, expert), rank), {})


def _scales(adapter: SavedAdapter, task: str | int | None) -> dict[str, tuple[float, ...]]:
    if task is not None:
        raise ExportError(
            f"task is {task!r} and per_expert is given; expected one of the two: the experts are the same for all "
            "tasks, and the report has each task's scales."
        )
    if adapter.others:
        raise ExportError(
            f"{adapter.folder} holds {adapter.others[0]} besides its layers, which no scale of an expert would reach. "
            "Leave per_expert out."
        )
    return dict(zip(_names(adapter.config), map(tuple, task_scales(adapter).tolist()), strict=True))


def _names(config: Any) -> list[str]:
    return list(config.task_names) if config.task_names else [f"task-{i}" for i in range(config.num_tasks)]


def _places(names: Sequence[str]) -> dict[str, str]:
    """A folder for each task: its name, as far as it can stand in one."""
    places = {name: re.sub(r"[^\w.-]+", "_", name).strip(".") or "_" for name in names}
    if len({place.lower() for place in places.values()}) < len(places):
        raise ExportError(
            f"Two tasks would share one folder: {', '.join(names)} differ only in characters that folders do not keep "
            "apart. Convert them one by one with --task."
        )
    return places


@dataclass(frozen=True)
class _Calibration:
    """What is needed to run the examples."""

    model: Any
    source: Path
    examples: str | Path | Sequence[Any]
    base: str | Path | None
    tokenizer: Any
    limit: int | None

    def observe(self, task: str | None, by_task: bool) -> Any:
        """Run the examples (of one task, or of all, apart or together)."""
        from multiflora.export.calibrate import observe
        from multiflora.export.examples import read_examples

        in_memory = not isinstance(self.model, str | Path)
        tokenizer, model = self.tokenizer, self.model
        if not in_memory:
            name = base_name(self.source, self.base)
            tokenizer = tokenizer or load_tokenizer_of(self.source, name)
        examples = read_examples(self.examples, tokenizer, limit=self.limit)
        if task is not None:
            chosen = [example for example in examples if example.task == task]
            if not chosen:
                seen = ", ".join(sorted({str(example.task) for example in examples}))
                raise ExportError(f"No calibration example is of task {task!r}; they are of {seen}.")
            examples = chosen
        if not in_memory:
            model = load_adapted(self.source, name)
        log.info("calibrating on %d examples", len(examples))
        return observe(model, examples, by_task=by_task)


def _routed_jobs(
    adapter: SavedAdapter,
    calibration: _Calibration,
    task: str | int | None,
    per_task: bool,
    fit: bool,
    rank: int | None,
) -> Iterator[_Job]:
    from multiflora.export.routed import routed_pairs

    if task is not None and per_task:
        raise ExportError("task and per_task are both given; expected one task, or one adapter for each.")
    name = _names(adapter.config)[index_of(adapter.config, task)] if isinstance(task, int) else task
    observed = calibration.observe(name, per_task)
    places = _places([key for key in observed if key is not None])
    extras = adapter.extras()
    for key, layers in observed.items():
        made = routed_pairs(adapter, layers, fit=fit, rank=rank)
        yield _Job("" if key is None else places[key], key or name, False, made, extras)
