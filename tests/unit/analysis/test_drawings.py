"""Every measure of a run has its figure, with the sentence that says how to read it and the words that stand for it."""

from __future__ import annotations

import pytest

from multiflora.analysis.drawings import mean_energy, run_drawings
from multiflora.comparison.across import findings, means, own_drawings, shared_drawings
from tests.made_comparison import made_measures


def names(drawings):
    return [drawing.name for drawing in drawings]


def test_a_run_without_heads_has_its_spectra_and_the_tasks_conflict():
    assert names(run_drawings(made_measures("lora"))) == [
        "spectrum",
        "energy",
        "spectrum-layers",
        "top-share",
        "entropy",
        "stable-rank",
        "norm",
        "task-conflict",
    ]


def test_a_run_with_routed_heads_has_all_figures():
    measures = made_measures("rlora")
    measures["similarity"] = {
        "phi": [[0.9, 0.9], [0.9, 0.8]],
        "chance": 0.1,
        "layers": 1,
        "by_layer": {"a": {"layer": 0, "module": "q_proj", "phi": 0.8}},
    }
    drawings = run_drawings(measures)
    assert {
        "similarity",
        "similarity-layers",
        "head-cosine",
        "head-norms",
        "heads",
        "routing-load",
        "routing-layers",
        "routing-entropy",
    } <= set(names(drawings))
    by_name = {drawing.name: drawing for drawing in drawings}
    assert "Dead: head 0 of model.layers.0.self_attn.q_proj, head 0 of" in by_name["routing-layers"].alt
    assert "mean 0.80" in by_name["routing-entropy"].alt
    assert "q_proj 0.20, v_proj 0.20" in by_name["head-cosine"].alt
    assert "q_proj 0.80" in by_name["similarity-layers"].alt
    for drawing in drawings:
        assert drawing.reading.endswith((".", "?"))
        assert drawing.alt.endswith(".")
        assert drawing.png.startswith(b"\x89PNG")


def test_the_energy_of_equal_directions_rises_evenly():
    layer = {"singular": [1.0, 1.0, 1.0, 1.0], "norm": 2.0}
    assert mean_energy([layer, layer]) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def runs(**changes):
    return [
        {**made_measures(label), "seed": seed} | changes.get(label, {})
        for label in ("lora", "multilora", "hydralora", "rlora")
        for seed in range(3)
    ]


def test_methods_beside_each_other_and_each_by_itself():
    assert names(shared_drawings(runs())) == ["energies", "effective-ranks", "top-shares", "head-cosines"]
    own = own_drawings(runs())
    assert names(own["lora"]) == ["lora-spectrum-layers", "lora-task-conflict"]
    assert "rlora-routing-layers" in names(own["rlora"])


def test_findings_say_whether_the_papers_direction_comes_out():
    said = findings(runs())
    assert said[0].startswith(
        "multilora spreads its update over more directions than lora, as arXiv 2311.11501 reports"
    )
    assert said[2].startswith("rlora has heads that differ more than those of hydralora, as arXiv 2502.15455 reports")
    same = made_measures("hydralora")["heads"]
    assert findings(runs(rlora={"heads": same}))[2].startswith("rlora does not come out as arXiv 2502.15455 reports")


def test_means_are_over_layers_and_seeds():
    assert means(runs(), "cosine") == {
        "multilora": pytest.approx([0.2] * 3),
        "hydralora": pytest.approx([0.9] * 3),
        "rlora": pytest.approx([0.2] * 3),
    }
