"""The figures of one run: MultiLoRA's spectra, R-LoRA's heads, the routers, the tasks' conflict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from multiflora.analysis.plots import Drawing, curves, heat_map, heat_maps, lines, points

__all__ = ["few_drawings", "mean_energy", "mean_spectrum", "run_drawings"]

Layers = Mapping[str, Mapping[str, Any]]


def run_drawings(measures: Mapping[str, Any]) -> list[Drawing]:
    """Draw what was measured on one run."""
    return [
        *_spectra(measures["spectra"]),
        *_similarity(measures.get("similarity") or {}),
        *_beyond_spectra(measures),
    ]


def few_drawings(measures: Mapping[str, Any]) -> list[Drawing]:
    """Draw of one run what means over runs do not show: its layers, heads, routing and the tasks' conflict."""
    modules = {m: own for m, own in _modules(measures["spectra"]).items() if mean_spectrum(own)}
    return [*([_by_layer_and_direction(modules)] if modules else []), *_beyond_spectra(measures)]


def _beyond_spectra(measures: Mapping[str, Any]) -> list[Drawing]:
    return [
        *_heads(measures["heads"]),
        *_routing(measures["routing"], measures["tasks"]),
        *_conflict(measures.get("conflict") or {}),
    ]


def mean_spectrum(layers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Singular values over the largest, mean over layers, as far as all have them."""
    shown = [layer["singular"] for layer in layers if layer["singular"] and layer["singular"][0] > 0]
    length = min((len(values) for values in shown), default=0)
    return [fmean(values[i] / values[0] for values in shown) for i in range(length)]


def mean_energy(layers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Cumulative energy of the first i directions, mean over layers."""
    shown = [layer for layer in layers if layer["norm"] > 0]
    length = min((len(layer["singular"]) for layer in shown), default=0)
    return [
        fmean(sum(s * s for s in layer["singular"][: i + 1]) / layer["norm"] ** 2 for layer in shown)
        for i in range(length)
    ]


def _modules(layers: Layers) -> dict[str, list[Mapping[str, Any]]]:
    """Module -> its layers, in order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers.values():
        found.setdefault(layer["module"], []).append(layer)
    return {module: sorted(own, key=lambda layer: layer["layer"]) for module, own in found.items()}


def _spectra(layers: Layers) -> Iterator[Drawing]:
    modules = _modules(layers)
    means = {module: mean_spectrum(own) for module, own in modules.items()}
    means = {module: values for module, values in means.items() if values}
    if not means:
        return
    last = {module: values[-1] for module, values in means.items()}
    flattest, steepest = max(last, key=lambda m: last[m]), min(last, key=lambda m: last[m])
    yield lines(
        "spectrum",
        "Singular values of the update",
        "A flat line means that many directions share the work; a steep one that a few do nearly all of it.",
        means,
        x="direction",
        y="singular value / largest",
        log=True,
        alt=f"Singular values by module, mean over layers. The last is {last[flattest]:.2g} of the largest in "
        f"{flattest} and {last[steepest]:.2g} in {steepest}.",
    )
    energy = {module: mean_energy(own) for module, own in modules.items() if module in means}
    yield lines(
        "energy",
        "Cumulative energy of the update",
        "How much of the update is in its first i directions: the sooner a line reaches 1, the fewer it uses.",
        energy,
        x="directions",
        y="share of the energy",
        alt="Cumulative energy by module. In the first direction: "
        + ", ".join(f"{module} {values[0]:.2f}" for module, values in energy.items())
        + ".",
    )
    yield _by_layer_and_direction(modules)
    for key, title, reading in (
        ("top_share", "Share of the first direction by layer", "1: the whole update goes one way; low: many share it."),
        ("entropy", "Entropy of the spectrum by layer", "1: all directions are equally strong; 0: one is alone."),
        ("stable_rank", "Stable rank by layer", "Higher means a less dominant first direction; the rank is its limit."),
        ("norm", "Size of the update by layer", "Where training has changed the weights most (Frobenius norm)."),
    ):
        values = {module: ([e["layer"] for e in own], [e[key] for e in own]) for module, own in modules.items()}
        means_of = {module: fmean(ys) for module, (_, ys) in values.items()}
        yield curves(
            key.replace("_", "-"),
            title,
            reading,
            values,
            x="layer",
            y=key.replace("_", " "),
            alt=f"{title}. Means: " + ", ".join(f"{m} {v:.3g}" for m, v in means_of.items()) + ".",
        )


def _by_layer_and_direction(modules: Mapping[str, Sequence[Mapping[str, Any]]]) -> Drawing:
    """Every singular value over the largest of its layer: a panel for each module, a row for each layer."""
    panels, weakest = {}, {}
    for module, own in modules.items():
        length = min(len(layer["singular"]) for layer in own)
        panels[module] = [
            [value / layer["singular"][0] if layer["singular"][0] > 0 else 0.0 for value in layer["singular"][:length]]
            for layer in own
        ]
        weakest[module] = fmean(row[-1] for row in panels[module])
    return heat_maps(
        "spectrum-layers",
        "Singular values by layer and module",
        "Each row is a layer (the first on top), each column a direction, each shade a singular value over the layer's "
        "largest: bright to the right means that many directions share the work.",
        panels,
        x="direction",
        y="layer",
        low=0.0,
        high=1.0,
        alt="Last singular value over the largest, mean over layers: "
        + ", ".join(f"{module} {value:.2g}" for module, value in weakest.items())
        + ".",
    )


def _similarity(found: Mapping[str, Any]) -> Iterator[Drawing]:
    if not found.get("phi"):
        return
    phi = found["phi"]
    names = [str(i + 1) for i in range(len(phi))]
    yield heat_map(
        "similarity",
        "Similarity of the update's directions",
        "Entry (i, j): how much of the first i directions here lies in the first j directions there; 1 is all of it, "
        f"{found['chance']:.3f} what random directions would have in common.",
        phi,
        rows=names,
        columns=names,
        y="first i directions here",
        x="first j directions there",
        low=0.0,
        high=1.0,
        alt=f"Subspace similarity, mean over {found['layers']} layers: {phi[0][0]:.2f} for the first direction, "
        f"{phi[-1][-1]:.2f} for the first {len(phi)}.",
    )
    modules = _modules(found["by_layer"])
    means = {module: fmean(layer["phi"] for layer in own) for module, own in modules.items()}
    yield curves(
        "similarity-layers",
        "Similarity of the update's directions by layer",
        f"How much of the first {len(phi)} directions both updates have in common, layer by layer.",
        {module: ([e["layer"] for e in own], [e["phi"] for e in own]) for module, own in modules.items()},
        x="layer",
        y=f"φ({len(phi)}, {len(phi)})",
        alt=f"φ({len(phi)}, {len(phi)}) by layer. Means: " + ", ".join(f"{m} {v:.2f}" for m, v in means.items()) + ".",
    )


def _heads(found: Mapping[str, Any]) -> Iterator[Drawing]:
    if not found:
        return
    modules = _modules(found["layers"])
    cosines = {
        module: (
            [e["layer"] for e in own if e["cosine"] is not None],
            [e["cosine"] for e in own if e["cosine"] is not None],
        )
        for module, own in modules.items()
    }
    cosines = {module: pair for module, pair in cosines.items() if pair[1]}
    if cosines:
        yield curves(
            "head-cosine",
            "Similarity of heads",
            "Mean cosine between the heads of a layer: near 1 they have learned the same, near 0 different things.",
            cosines,
            x="layer",
            y="mean pairwise cosine",
            alt="Mean cosine of heads by layer. Means: "
            + ", ".join(f"{m} {fmean(ys):.2f}" for m, (_, ys) in cosines.items())
            + ".",
        )
    spread = {
        module: ([e["layer"] for e in own], [max(e["norms"]) / max(min(e["norms"]), 1e-12) for e in own])
        for module, own in modules.items()
    }
    yield curves(
        "head-norms",
        "Sizes of heads",
        "The largest head of a layer over its smallest: 1 is balanced; far above 1, one head does the work.",
        spread,
        x="layer",
        y="largest norm / smallest",
        log=max(max(ys) for _, ys in spread.values()) > 10,
        alt="Ratio of head norms by layer. Largest: "
        + ", ".join(f"{m} {max(ys):.3g}" for m, (_, ys) in spread.items())
        + ".",
    )
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for module, own in found["points"].items():
        for point in own:
            panels.setdefault(module, {}).setdefault(f"head {point['head']}", []).append((point["x"], point["y"]))
    if panels:
        yield points(
            "heads",
            "Heads in the plane (t-SNE)",
            "Each point is one head of one layer, laid out module by module; points that lie close are alike, other "
            "distances mean nothing.",
            panels,
            alt="t-SNE of heads: "
            + ", ".join(f"{len(own)} of {module}" for module, own in found["points"].items())
            + ".",
        )


def _routing(layers: Layers, tasks: Sequence[str]) -> Iterator[Drawing]:
    layers = {name: layer for name, layer in layers.items() if len(layer["load"]) > 1}
    if not layers:
        return
    widths = {len(layer["load"]) for layer in layers.values()}
    by_task = [layer["by_task"] for layer in layers.values() if layer["by_task"]]
    if len(widths) == 1 and by_task:
        count = widths.pop()
        table = [[fmean(rows[t][h] for rows in by_task) for h in range(count)] for t in range(len(by_task[0]))]
        yield heat_map(
            "routing-load",
            "Load of each head by task",
            f"Mean gate over tokens and layers; {1 / count:.2f} everywhere would be no routing at all.",
            table,
            rows=[tasks[t] for t in range(len(table))],
            columns=[f"head {h}" for h in range(count)],
            low=0.0,
            alt="Mean load: "
            + "; ".join(f"{tasks[t]} " + ", ".join(f"{v:.2f}" for v in row) for t, row in enumerate(table))
            + ".",
        )
    if len({len(layer["load"]) for layer in layers.values()}) == 1:
        yield _load_by_layer(layers)
    names = list(layers)
    dead = sum(len(layer["dead"]) for layer in layers.values())
    values = [layers[name]["entropy"] for name in names]
    yield lines(
        "routing-entropy",
        "How undecided the routers are",
        f"Entropy of the gate, 1 is an even blend and 0 one head alone; {dead} heads of all layers are dead.",
        {"entropy": values},
        x="adapted layer, in the order of the model",
        y="entropy / log(heads)",
        alt=f"Gate entropy over {len(values)} layers: mean {fmean(values):.2f}, from {min(values):.2f} to "
        f"{max(values):.2f}; {dead} dead heads.",
    )


def _load_by_layer(layers: Layers) -> Drawing:
    """The load of each head in each layer, where a dead one shows."""
    dead = [f"head {h} of {name}" for name, layer in layers.items() for h in layer["dead"]]
    listed = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
    return heat_map(
        "routing-layers",
        "Load of each head by layer",
        "Mean gate over tokens, one row for each adapted layer, in the order of the model: a dark cell is a head that "
        "hardly any token uses.",
        [layer["load"] for layer in layers.values()],
        rows=[str(k + 1) for k in range(len(layers))],
        columns=[f"head {h}" for h in range(len(next(iter(layers.values()))["load"]))],
        y="adapted layer",
        low=0.0,
        written=False,
        alt=f"Mean load of each head in {len(layers)} layers. Dead: {listed or 'none'}.",
    )


def _conflict(found: Mapping[str, Any]) -> Iterator[Drawing]:
    if not found:
        return
    groups = "; ".join(", ".join(group) for group in found["groups"])
    yield heat_map(
        "task-conflict",
        "Do tasks pull the same way?",
        f"Cosine of the tasks' gradients: below 0 a step for one raises the other's loss. Tasks that agree: {groups}.",
        found["cosine"],
        rows=found["tasks"],
        columns=found["tasks"],
        low=-1.0,
        high=1.0,
        diverging=True,
        alt=f"Gradient cosines between {len(found['tasks'])} tasks. Suggested groups: {groups}.",
    )
