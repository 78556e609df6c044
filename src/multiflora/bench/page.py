"""The page on performance: a template filled from the results, so that no number in it is written by hand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from multiflora.bench.plots import LABELS, figures
from multiflora.bench.results import Clock, ExpertsCase, GenerateCase, LayerCase, Results, Samples, ServeCase, StepCase
from multiflora.bench.stats import extra_ratio, median, over_floor, ratio, spread, total
from multiflora.bench.table import HEADER, cells
from multiflora.bench.verdict import Verdict, verdicts
from multiflora.files import saving, write_text

__all__ = ["render", "write_page"]

_TEMPLATE = "performance.md.j2"


def write_page(results: Results, page: Path) -> None:
    """Write the page, and its figures into a folder of the page's name beside it.

    Raises:
        EnvironmentProblem: matplotlib is absent, or the system refuses to write.

    Example:
        >>> write_page(load(Path("bench.json")), Path("docs/performance.md"))  # doctest: +SKIP
    """
    drawn, folder = figures(results), page.with_suffix("")
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        write_text(folder / f"{name}.svg", svg)
    write_text(page, render(results, folder.name, drawn))


def render(results: Results, name: str, drawn: Collection[str]) -> str:
    """Fill the template.

    Args:
        results: The samples.
        name: Of the page, and of the folder with its figures.
        drawn: Names of the figures there are.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("multiflora.bench", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    judged = verdicts(results)
    filled: str = environment.get_template(_TEMPLATE).render(
        results=results,
        machine=results.machine,
        cpu_clock=results.clock == "cpu",
        rounds=_rounds(results),
        header=HEADER,
        rows=[cells(verdict) for verdict in judged],
        missed=[_miss(verdict, results) for verdict in judged if verdict.lines and verdict.word != "held"],
        floor_of_modules=any("multilora products" in case.seconds for case in results.steps),
        layers=[_layer(case, results) for case in results.layers],
        ratios=[_ratios(case, results.clock) for case in results.layers],
        heads=[_heads(case, results.clock) for case in results.heads],
        shared=[
            (
                case.name,
                ratio(total(case.seconds, "together", results.clock), total(case.seconds, "apart", results.clock)),
            )
            for case in results.shared
        ],
        experts=[_experts(case, results.clock) for case in results.experts],
        steps=[
            (
                case,
                [
                    (LABELS[name], _parts(case.seconds, name, results.clock), _step_facts(case, name))
                    for name in case.seconds
                ],
            )
            for case in results.steps
        ],
        training=[
            (case, {name: case.tokens / median(total(case.seconds, name, results.clock)) for name in case.seconds})
            for case in results.training
        ],
        generated=[(case, _generated(case, results.clock)) for case in results.generate],
        served=[(case, _served(case)) for case in results.serve],
        name=name,
        figures={figure: f"{name}/{figure}.svg" for figure in drawn},
        labels=LABELS,
        mb=lambda number: f"{number / 1e6:,.2f}",
    )
    return filled


def _rounds(results: Results) -> list[str]:
    """How many rounds the cases of each section had: a preset has its numbers, ``--rounds`` gives another."""
    sections: dict[str, Sequence[Any]] = {
        "layers": results.layers,
        "numbers of heads": results.heads,
        "shared inputs": results.shared,
        "experts": results.experts,
        "steps": results.steps,
        "training": results.training,
        "generation": results.generate,
        "serving": results.serve,
    }
    found = []
    for name, cases in sections.items():
        counts = {len(total(case.seconds, next(iter(case.seconds)), results.clock)) for case in cases}
        if counts:
            found.append(f"{name} {' to '.join(str(count) for count in sorted({min(counts), max(counts)}))}")
    return found


def _layer(case: LayerCase, results: Results) -> dict[str, Any]:
    """A case's times in milliseconds: the frozen layer's, what each competitor adds to it, and the floors."""
    clock, machine = results.clock, results.machine
    added = {
        name: _added(case.seconds, name, clock)
        for name in ("packed", "peft", "loop", "compiled loop")
        if name in case.seconds
    }
    roofline = max(case.flops / machine.gemm_rate[case.dtype], case.bytes / machine.copy_rate)
    seconds = [total(case.seconds, name, clock) for name in ("packed", "frozen", "products")]
    return {
        "case": case,
        "frozen": 1e3 * median(total(case.seconds, "frozen", clock)),
        "added": {name: added.get(name, "") for name in ("packed", "peft", "loop", "compiled loop")},
        "roofline": 1e3 * roofline,
        "products": 1e3 * median(seconds[2]),
        "over": over_floor(*seconds),
    }


def _added(seconds: Samples, name: str, clock: Clock) -> str:
    """Milliseconds added by a competitor, and how they divide into forward and backward."""
    parts = []
    for phase in ("forward", "backward"):
        ours, frozen = (seconds[who][phase][clock] for who in (name, "frozen"))
        parts.append(1e3 * median([a - b for a, b in zip(ours, frozen, strict=True)]))
    whole = 1e3 * median(
        [a - b for a, b in zip(total(seconds, name, clock), total(seconds, "frozen", clock), strict=True)]
    )
    return f"{whole:.1f} ({parts[0]:.1f} + {parts[1]:.1f})"


def _ratios(case: LayerCase, clock: Clock) -> tuple[str, list[str]]:
    """Ours over each opponent, by the time they add, with quartiles."""
    ours, frozen = total(case.seconds, "packed", clock), total(case.seconds, "frozen", clock)
    return case.name, [
        str(extra_ratio(ours, total(case.seconds, name, clock), frozen)) if name in case.seconds else ""
        for name in ("loop", "peft", "compiled loop")
    ]


def _heads(case: LayerCase, clock: Clock) -> tuple[str, list[str]]:
    """Milliseconds added by each number of heads."""
    frozen = total(case.seconds, "frozen", clock)
    columns = ("packed 2", "packed 4", "packed 8", "packed 16", "loop 2", "loop 16")
    name = f"{case.model} {case.layer} {case.d_in}→{case.d_out}, {case.tokens} tokens, {case.dtype}"
    return f"{name}, dropout {case.dropout:g}", [
        f"{1e3 * median([a - b for a, b in zip(total(case.seconds, column, clock), frozen, strict=True)]):.1f}"
        for column in columns
    ]


def _experts(case: ExpertsCase, clock: Clock) -> list[str]:
    """Milliseconds of the frozen experts, each competitor's time over theirs, and what ours adds over peft's."""
    ours, peft, frozen = (total(case.seconds, name, clock) for name in ("packed", "peft", "frozen"))
    numbers = (ratio(ours, frozen), ratio(peft, frozen), extra_ratio(ours, peft, frozen))
    return [case.name, f"{1e3 * median(frozen):.2f}", *map(str, numbers)]


def _parts(seconds: Samples, name: str, clock: Clock) -> list[float]:
    """Seconds of a step: all, forward, backward, update."""
    phases = seconds[name]
    return [
        median(total(seconds, name, clock)),
        *(median(phases[phase][clock]) if phase in phases else 0.0 for phase in ("forward", "backward", "update")),
    ]


def _step_facts(case: StepCase, name: str) -> tuple[str, str]:
    """Trainable parameters and peak memory."""
    parameters, peak = case.parameters.get(name), case.peak_bytes.get(name)
    return "" if parameters is None else f"{parameters:,}", "" if peak is None else f"{peak / 1e6:,.0f}"


def _generated(case: GenerateCase, clock: Clock) -> list[list[str]]:
    """Each competitor's milliseconds and ratios, and the floor's."""
    seconds = {name: {phase: by[clock] for phase, by in phases.items()} for name, phases in case.seconds.items()}
    seconds["products"] = {
        phase: [a + b for a, b in zip(base, seconds["products"][phase], strict=True)]
        for phase, base in seconds["base"].items()
    }
    rows = []
    for name, phases in seconds.items():
        row = [{"products": "floor", "peft": "peft LoRA", "peft merged": "peft LoRA, merged"}.get(name, name)]
        for phase, times in (("decode", case.tokens), ("prefill", 1)):
            row.append(f"{1e3 * median(phases[phase]) / times:.1f}")
            row.append("" if name == "base" else str(ratio(phases[phase], seconds["base"][phase])))
        parameters = case.parameters.get(name)
        rows.append([*row, "" if parameters is None else f"{parameters:,}"])
    return rows


def _served(case: ServeCase) -> list[list[str]]:
    """Each load's tokens per second, and the server's own time for a token."""
    names = {"base": "base, {} clients", "rlora": "R-LoRA, {} clients", "mixed": "base and four adapters, {} clients"}
    names["transformers serve"] = "`transformers serve`, base, {} clients"
    rows = []
    for load in case.seconds:
        own = 1e3 / median(case.speeds(load, "cpu"))
        speed = spread(case.speeds(load))
        shown = f"{speed.value:.0f} ({speed.low:.0f} to {speed.high:.0f})"
        rows.append([names.get(load, load).format(case.clients), f"{case.written[load]:,}", shown, f"{own:.1f}"])
    return rows


def _miss(verdict: Verdict, results: Results) -> dict[str, Any]:
    """A missed target: its cases that miss, and the profile of the worst one."""
    held = set(verdict.held)
    lines = [line for line in verdict.lines if line not in held]
    worst = verdict.worst
    cases: list[LayerCase | ExpertsCase | StepCase | GenerateCase] = [*results.layers, *results.experts, *results.steps]
    cases += results.generate
    profile = next((case.profile for case in cases if worst is not None and worst.case.endswith(case.name)), {})
    ours = verdict.target.ours
    operators = sorted(profile.get(ours, {}).items(), key=lambda item: -item[1])[:8]
    frozen = profile.get("frozen") or profile.get("base", {})
    return {
        "verdict": verdict,
        "lines": lines,
        "out_of_reach": [line for line in lines if line in verdict.out_of_reach],
        "worst": worst,
        "ours": LABELS[ours],
        "profile": [(name, 1e3 * seconds, _milliseconds(frozen.get(name))) for name, seconds in operators],
    }


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"
