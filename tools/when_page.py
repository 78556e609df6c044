"""The page of the study "when do many branches pay?", from its packed cells alone.

The plan stands on the page, written before any run; here is the same in code. Every claim is `multiflora compare`'s
own: the paired test over seeds, Holm's correction, the margin, the planned looks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from choosing import listed, put  # noqa: E402
from when import BUDGETS, CONFLICTS, METHODS, SEEDS, SHARES, TASKS, Condition, conditions, read_packed  # noqa: E402

from multiflora.comparison.looks import Look, look_at, planned_looks  # noqa: E402
from multiflora.comparison.statistics import (  # noqa: E402
    CLAIM,
    Array,
    Difference,
    Interval,
    crossed_tests,
    holm,
    p_value,
    t_interval,
)
from multiflora.comparison.summary import claims_of  # noqa: E402
from multiflora.comparison.words import Claim  # noqa: E402
from multiflora.files import write_text  # noqa: E402

MARGIN = 0.02
"""Two points: a smaller difference does not matter."""

LOOKS = planned_looks(5, len(SEEDS))
GATED = ("mtllora", "moelora")
"""The methods whose gate knows the task."""

TITLES = {
    "lora": "LoRA",
    "multilora": "MultiLoRA",
    "rlora": "R-LoRA",
    "hydralora": "HydraLoRA",
    "mlora": "M-LoRA",
    "mtllora": "MTL-LoRA",
    "moelora": "MOELoRA",
    "single": "K LoRAs",
}
# Okabe and Ito's colours, light enough for black words
COLOURS = {
    "mtllora": "#7fc8f8",
    "moelora": "#66d1b0",
    "single": "#f3c14b",
    "rlora": "#e8a6c9",
    "hydralora": "#f0a070",
    "multilora": "#c9b8f0",
    "mlora": "#d8c49a",
    "lora": "#d9d9d9",
}

Packed = Mapping[str, Any]
Outcomes = dict[str, dict[str, Array]]


class Finding(NamedTuple):
    """What a condition's cells say."""

    seeds: tuple[int, ...]
    look: Look
    claims: Mapping[str, Claim]
    """Method -> its claim against LoRA."""
    course: Mapping[str, Mapping[float, Interval]]
    """Method -> share of the steps -> score over seeds."""

    @property
    def complete(self) -> bool:
        """Whether all its seeds are there."""
        return len(self.seeds) == len(SEEDS)

    @property
    def better(self) -> list[str]:
        """Methods that did better than LoRA, the highest first."""
        found = [label for label, claim in self.claims.items() if claim.verdict == "better"]
        return sorted(found, key=lambda label: -self.claims[label].interval.mean)


def read_all(folder: Path) -> dict[Condition, Packed]:
    """The conditions that have packed seeds, in the order in which they are run."""
    found = {each: read_packed(folder / f"{each.name}.json.gz") for each in conditions()}
    return {each: packed for each, packed in found.items() if packed is not None and packed["seeds"]}


def outcomes(packed: Packed, share: float = 1.0) -> Outcomes:
    """Method -> task -> (seeds, rows) at the end, (seeds, 1) of scores on the way; without methods that diverged."""
    cells = [packed["seeds"][seed]["cells"] for seed in sorted(packed["seeds"], key=int)]
    found: Outcomes = {}
    for label in METHODS:
        own = [cell[label] for cell in cells]
        if any(cell is None for cell in own):
            continue
        parts = [cell["rows"] if share == 1 else cell["course"][f"{share:g}"] for cell in own]
        found[label] = {task: np.array([np.atleast_1d(part[task]) for part in parts], float) for task in parts[0]}
    return found


def finding(packed: Packed) -> Finding:
    """Test a condition's methods against LoRA; its level is the study's, shared among all planned conditions."""
    seeds = tuple(sorted(map(int, packed["seeds"])))
    look = look_at(seeds, LOOKS)
    look = look._replace(level=look.level / len(conditions()))
    found = outcomes(packed)
    claims: dict[str, Claim] = {}
    if "lora" in found:
        differences = {("score", label): each for label, each in _tests(found).items()}
        claims = {label: own["score"] for label, own in claims_of(differences, look, MARGIN, _waits(packed)).items()}
    course: dict[str, dict[float, Interval]] = {label: {} for label in found}
    for share in (*SHARES, 1.0):
        for label, tasks in outcomes(packed, share).items():
            course[label][share] = t_interval(_by_seed(tasks))
    return Finding(seeds, look, claims, course)


def _tests(found: Outcomes) -> dict[str, Difference]:
    return crossed_tests(found, "lora", shared_rows=False)


def _by_seed(tasks: Mapping[str, Array]) -> Array:
    by_seed: Array = np.mean([rows.mean(1) for rows in tasks.values()], axis=0)
    return by_seed


def _waits(packed: Packed) -> dict[str, str]:
    """Method -> what a claim waits for: its rate or LoRA's is not tuned."""
    state = {label: own["state"] for label, own in packed["methods"].items()}
    return {
        label: ", ".join(f"{TITLES[each]} {state[each]}" for each in (label, "lora") if state[each] != "tuned")
        for label in METHODS
    }


# ---- the primary hypotheses ----


class Primary(NamedTuple):
    """One method in one hypothesis: its difference to LoRA, averaged over the conditions that are there."""

    label: str
    difference: Difference
    p: float | None
    """Of "no difference", corrected."""
    p_loss: float | None
    """Of "worse by the margin or more", corrected."""
    p_gain: float | None
    """Of "better by the margin or more", corrected."""


def pooled(found: Mapping[Condition, Packed], conflict: float, share: float = 1.0) -> Outcomes:
    """Method -> condition -> (seeds, 1): the macro scores in all conditions of one conflict, on common seeds.

    Only conditions with all seeds count, and methods that are tuned in each of them beside LoRA.
    """
    chosen = {
        each: packed
        for each, packed in found.items()
        if each.conflict == conflict and len(packed["seeds"]) == len(SEEDS)
    }
    every = {each.name: outcomes(packed, share) for each, packed in chosen.items()}
    waits = [_waits(packed) for packed in chosen.values()]
    return {
        label: {name: _by_seed(own[label])[:, None] for name, own in every.items()}
        for label in METHODS
        if every and all(label in own for own in every.values()) and not any(wait[label] for wait in waits)
    }


def primary(found: Mapping[Condition, Packed]) -> dict[str, list[Primary]]:
    """Test all primary hypotheses together, corrected for their number."""
    groups: dict[str, dict[str, Difference]] = {"gain": {}, "same": {}, "speed": {}}
    high, half = pooled(found, 1.0), pooled(found, 1.0, 0.5)
    if "lora" in high:
        own = {label: high[label] for label in (*GATED, "lora") if label in high}
        groups["gain"] = _tests(own)
        # the gain at half of the steps minus the gain at the end
        late = {label: {name: high[label][name] - high["lora"][name] for name in high[label]} for label in own}
        mid = {label: {name: half[label][name] - half["lora"][name] for name in half[label]} for label in own}
        for label in groups["gain"]:
            groups["speed"][label] = crossed_tests({label: mid[label], "end": late[label]}, "end", shared_rows=False)[
                label
            ]
    if "lora" in (low := pooled(found, 0.0)):
        groups["same"] = _tests(low)
    p: dict[tuple[str, str, str], float] = {}
    for group, tests in groups.items():
        for label, each in tests.items():
            if each.p is None or each.spread is None:
                continue
            mean = each.interval.mean
            p[group, label, "none"] = each.p
            p[group, label, "loss"] = p_value(mean + MARGIN, each.spread) if mean > -MARGIN else 1.0
            p[group, label, "gain"] = p_value(MARGIN - mean, each.spread) if mean < MARGIN else 1.0
    # the planned number, whatever is there: two and two at conflict 1, seven at conflict 0
    planned = 2 * len(GATED) + len(METHODS) - 1
    padding = [1.0] * (planned - len({place[:2] for place in p}))
    values = holm([*p.values(), *padding], [*(place[:2] for place in p), *range(len(padding))])
    corrected = dict(zip(p, values, strict=False))
    return {
        group: [
            Primary(label, each, *(corrected.get((group, label, kind)) for kind in ("none", "loss", "gain")))
            for label, each in tests.items()
        ]
        for group, tests in groups.items()
    }


def _below(p: float | None) -> bool:
    return p is not None and p < CLAIM


def answers(found: Mapping[Condition, Packed]) -> list[str]:
    """A paragraph for each primary hypothesis."""
    tested = primary(found)
    told = []
    there = {value: len(_complete(found, value)) for value in (1.0, 0.0)}
    planned = len(TASKS) * len(BUDGETS)
    head = "**1. At conflict 1 a gate that knows the task gains over LoRA.**"
    if not tested["gain"]:
        told.append(f"{head} Not tested yet: {_needs(there[1.0], planned)}.")
    else:
        parts = []
        for each in tested["gain"]:
            won = _below(each.p) and each.difference.interval.mean > 0
            verdict = "supported" if won else "refuted" if _below(each.p_gain) else "undecided"
            parts.append(f"{TITLES[each.label]}: {verdict} ({_points(each.difference)}, p {_p(each.p)})")
        told.append(f"{head} {'; '.join(parts)}. {_of(there[1.0], planned)}")
    head = "**2. At conflict 0 no method is worse than LoRA by two points, and none better.**"
    if not tested["same"]:
        told.append(f"{head} Not tested yet: {_needs(there[0.0], planned)}.")
    else:
        same, against, open_ = [], [], []
        for each in tested["same"]:
            words, (mean, _, high) = f"{TITLES[each.label]} ({_points(each.difference)})", each.difference.interval
            if _below(each.p_loss) and _below(each.p_gain):
                same.append(words)
            elif _below(each.p) and (mean > 0 or (high is not None and high < -MARGIN)):
                against.append(words)
            else:
                open_.append(words)
        parts = []
        if same:
            parts.append(f"Within two points of LoRA: {listed(same)}.")
        if against:
            parts.append(f"Refuted by {listed(against)}.")
        if open_:
            parts.append(f"Undecided: {listed(open_)}.")
        told.append(f"{head} {' '.join(parts)} {_of(there[0.0], planned)}")
    head = "**3. The gain at conflict 1 is one of speed: it is smaller at the end than at half of the steps.**"
    if not tested["speed"]:
        told.append(f"{head} Not tested yet: {_needs(there[1.0], planned)}.")
    else:
        parts = []
        for each in tested["speed"]:
            mean = each.difference.interval.mean
            verdict = "undecided"
            if _below(each.p) and mean > 0:
                verdict = "supported"
            elif _below(each.p_gain):
                verdict = "refuted, the gain does not shrink by two points"
            parts.append(
                f"{TITLES[each.label]}: {verdict} (gain at half minus gain at the end {_points(each.difference)})"
            )
        told.append(f"{head} {'; '.join(parts)}. {_of(there[1.0], planned)}")
    return told


def _complete(found: Mapping[Condition, Packed], conflict: float) -> dict[Condition, Packed]:
    """Those with one conflict that have all their seeds."""
    full = {each: packed for each, packed in found.items() if len(packed["seeds"]) == len(SEEDS)}
    return {each: packed for each, packed in full.items() if each.conflict == conflict}


def _needs(there: int, planned: int) -> str:
    if there:
        return f"{there} of {planned} conditions are complete, and in them too few methods are tuned"
    return "no condition with this conflict has all its seeds, and only those count"


def _of(there: int, planned: int) -> str:
    return f"From {there} of {planned} planned conditions."


# ---- words and tables ----


def _points(difference: Difference) -> str:
    mean, low, high = difference.interval
    if low is None or high is None:
        return f"{100 * mean:+.1f} points"
    return f"{100 * mean:+.1f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f}"


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def state_of(each: Finding) -> str:
    """A condition in a few words."""
    if each.look.level == 0:
        return f"{len(each.seeds)} of {len(SEEDS)} seeds"
    if each.better:
        return f"{TITLES[each.better[0]]} {100 * each.claims[each.better[0]].interval.mean:+.0f}"
    if each.claims and all(claim.verdict == "worse" for claim in each.claims.values()):
        return "LoRA"
    return "undecided" if each.complete else f"undecided at {len(each.seeds)} seeds"


def coverage(found: Mapping[Condition, Packed]) -> str:
    """How much of the plan is there."""
    planned = len(conditions()) * len(SEEDS) * len(METHODS)
    done = sum(len(packed["seeds"]) for packed in found.values()) * len(METHODS)
    started = len(found)
    if not done:
        return f"Nothing has been run yet: 0 of {planned:,} planned cells."
    return f"{done:,} of {planned:,} planned cells are there, in {started} of {len(conditions())} conditions."


def generated(found: Mapping[Condition, Packed], picture: str) -> str:
    """The page's generated part."""
    findings = {each: finding(packed) for each, packed in found.items()}
    parts = [coverage(found), f"![{describe(findings)}]({picture})", CAPTION, *answers(found)]
    if found:
        parts += [_overview(findings), *_tables(found, findings), _made_of(found)]
    return "\n\n".join(parts)


CAPTION = (
    "*Who wins where.* A name stands where at least one method did better than LoRA: the one with the highest score, "
    "and its gain in points (those that did better are not tested against each other). *undecided*: nothing did "
    "better, and not everything did worse. *LoRA*: everything else did worse. A number of seeds: too few for a claim."
)


def _overview(findings: Mapping[Condition, Finding]) -> str:
    others = METHODS[1:]
    lines = [
        "Difference to LoRA at the end, in points. **Bold**: better or worse by the tests; *n*: no worse by two.",
        "",
        f"| condition | seeds | LoRA, % | {' | '.join(TITLES[label] for label in others)} |",
        "|" + "---|" * (len(others) + 3),
    ]
    for each in conditions():
        found = findings.get(each)
        if found is None:
            cells = ["0", "not run", *[""] * len(others)]
        else:
            base = found.course.get("lora")
            cells = [str(len(found.seeds)), f"{100 * base[1.0].mean:.1f}" if base else "diverged"]
            cells += [_cell(found.claims.get(label)) for label in others]
        lines.append(f"| {_title(each)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(claim: Claim | None) -> str:
    if claim is None:
        return "–"
    words = f"{100 * claim.interval.mean:+.1f}"
    return {"better": f"**{words}**", "worse": f"**{words}**", "no worse": f"{words} *n*"}.get(claim.verdict, words)


def _title(each: Condition) -> str:
    return f"{each.tasks} tasks, conflict {each.conflict:g}, rank {each.rank}"


def _tables(found: Mapping[Condition, Packed], findings: Mapping[Condition, Finding]) -> Iterator[str]:
    for each, one in findings.items():
        packed = found[each]
        base = packed["methods"]["lora"]["parameters"]
        lines = [
            f"### {_title(each)}",
            "",
            f"{len(one.seeds)} of {len(SEEDS)} seeds. Scores are accuracy in %, mean over seeds.",
            "",
            "| method | rank | parameters / LoRA's | rate | 1/8 | 1/4 | 1/2 | end | to LoRA, points | p | verdict |",
            "|" + "---|" * 11,
        ]
        for label in METHODS:
            own, claim = packed["methods"][label], one.claims.get(label)
            if label not in one.course:
                lines.append(f"| {TITLES[label]} |" + " |" * 9 + " diverged |")
                continue
            scores = [f"{100 * one.course[label][share].mean:.1f}" for share in (*SHARES, 1.0)]
            rate = f"{own['rate']:g}" + ("" if own["state"] == "tuned" else f" ({own['state']})")
            told = ["–", "–", "–"]
            if claim is not None:
                mean, low, high = claim.interval
                ends = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"
                p = "–" if claim.p is None else "< 0.001" if claim.p < 0.001 else f"{claim.p:.3f}"
                told = [f"{100 * mean:+.1f}{ends}", p, _verdict(claim, one)]
            first = f"{TITLES[label]} | {own['rank']} | {own['parameters'] / base:.2f} | {rate}"
            lines.append(f"| {first} | {' | '.join([*scores, *told])} |")
        yield "\n".join(lines)


def _verdict(claim: Claim, one: Finding) -> str:
    if one.look.level == 0:
        return "too few seeds"
    return claim.verdict if claim.tuned else "not tuned"


def _made_of(found: Mapping[Condition, Packed]) -> str:
    seeds = [seed for packed in found.values() for seed in packed["seeds"].values()]
    codes = {seed["code"] for seed in seeds}
    every = [cell["cpu_seconds"] for seed in seeds for cell in seed["cells"].values() if cell]
    mean = sum(every) / max(len(every), 1)
    return (
        f"A cell took {mean:.0f} CPU seconds on average, training and scoring. The cells come from "
        f"{len(codes)} version{'' if len(codes) == 1 else 's'} of the code; within a seed all methods have the same."
    )


def paragraph(found: Mapping[Condition, Packed], picture: str) -> str:
    """What stands on the page of choosing: the picture and one paragraph, of what was measured alone."""
    if not found:
        return "*When do many branches pay?* The study is planned and [not run yet](results/when.md)."
    findings = {each: finding(packed) for each, packed in found.items()}
    parts = [f"*When do many branches pay?* {coverage(found)}"]
    claimable = {each: one for each, one in findings.items() if one.look.level}
    wins = [
        f"{_title(each)}: {listed([TITLES[label] for label in one.better])}"
        for each, one in claimable.items()
        if one.better
    ]
    open_ = len(claimable) - len(wins)
    to_come = sum(not one.better and not one.complete for one in claimable.values())
    if wins:
        parts.append(f"Better than LoRA with as many parameters: {'; '.join(wins)}.")
    if open_:
        noun = "condition" if open_ == 1 else "conditions"
        more = f"; {to_come} of them with seeds still to come" if to_come else ""
        parts.append(f"In {open_} {noun} no method could be shown to be better{more}.")
    if not claimable:
        parts.append("None has enough seeds for a claim yet.")
    parts.append("One tiny model, made-up conflicts of labels: [the study](results/when.md).")
    return f"![{describe(findings)}]({picture})\n\n{' '.join(parts)}"


# ---- the picture ----

_W, _H, _LEFT, _TOP = 150, 56, 90, 44


def describe(findings: Mapping[Condition, Finding]) -> str:
    """The picture in words."""
    told = [f"{_title(each)}: {state_of(one)}" for each, one in findings.items()]
    missing = len(conditions()) - len(findings)
    return "; ".join([*told, *([f"{missing} conditions not run"] if missing else [])])


def draw(findings: Mapping[Condition, Finding]) -> str:
    """The phase diagram as SVG: a panel for each budget, conflict to the right, tasks upwards."""
    panel = _LEFT + len(CONFLICTS) * _W + 20
    width, height = len(BUDGETS) * panel, _TOP + len(TASKS) * _H + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">',
        '<defs><pattern id="open" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0v7" stroke="#d8d8d8" stroke-width="4"/></pattern></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for k, rank in enumerate(BUDGETS):
        x0 = k * panel + _LEFT
        middle = x0 + len(CONFLICTS) * _W / 2
        parts.append(_text(middle, 24, f"as many parameters as LoRA of rank {rank}", bold=True))
        parts.append(_text(middle, height - 8, "conflict: share of the labels that differ among tasks"))
        for i, conflict in enumerate(CONFLICTS):
            parts.append(_text(x0 + (i + 0.5) * _W, height - 28, f"{conflict:g}"))
        for j, tasks in enumerate(reversed(TASKS)):
            y = _TOP + j * _H
            parts.append(_text(x0 - 42, y + _H / 2 + 5, f"{tasks} tasks"))
            for i, conflict in enumerate(CONFLICTS):
                parts += _box(x0 + i * _W, y, findings.get(Condition(tasks, conflict, rank)))
    return "\n".join([*parts, "</svg>", ""])


def _box(x: float, y: float, found: Finding | None) -> Iterator[str]:
    fill, words, dash = "#ffffff", "not run", ' stroke-dasharray="4 3"'
    if found is not None:
        words, dash = state_of(found), ""
        if found.look.level:
            winner = found.better[0] if found.better else "lora"
            fill = "url(#open)" if words.startswith("undecided") else COLOURS[winner]
    place = f'x="{x + 2}" y="{y + 2}" width="{_W - 4}" height="{_H - 4}" rx="4"'
    yield f'<rect {place} fill="{fill}" stroke="#888888"{dash}/>'
    yield _text(x + _W / 2, y + _H / 2 + 5, words, bold=found is not None and bool(found.better), grey=found is None)


def _text(x: float, y: float, words: str, *, bold: bool = False, grey: bool = False) -> str:
    more = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{"#777777" if grey else "#111111"}"{more}>{words}</text>'


def write_pages(packed: Path, docs: Path = ROOT / "docs") -> None:
    """Write the generated parts of the two pages, and the picture."""
    found = read_all(packed)
    findings = {each: finding(own) for each, own in found.items()}
    write_text(docs / "results" / "when" / "phases.svg", draw(findings))
    for page, text in (
        (docs / "results" / "when.md", generated(found, "when/phases.svg")),
        (docs / "choosing.md", paragraph(found, "results/when/phases.svg")),
    ):
        write_text(page, put(page.read_text("utf-8"), text, "when"))
