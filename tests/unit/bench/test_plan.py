"""What a benchmark runs."""

from __future__ import annotations

import pytest

from multiflora.bench.plan import GENERATED_TASKS, PRESETS, SECTIONS, plan
from multiflora.tasks import load_task

OPTIONS = {"dtype": "bfloat16", "compiler": True, "tasks": GENERATED_TASKS}
IN_FLOAT32 = {**OPTIONS, "dtype": "float32"}


@pytest.mark.parametrize("options", [OPTIONS, IN_FLOAT32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_every_section(preset, kind, options):
    jobs = plan(preset, kind=kind, **options)
    assert {job.section for job in jobs} == set(SECTIONS)
    identities = [(job.section, tuple(sorted(job.identity.items()))) for job in jobs]
    assert len(set(identities)) == len(identities), "a resumed run would take two cases for one"


def test_presets_grow():
    cost = [sum(job.cost for job in plan(preset, kind="cpu", **OPTIONS)) for preset in PRESETS]
    assert cost == sorted(cost)
    assert cost[0] < 240
    assert cost[1] < 1500


def test_the_standard_preset_measures_what_the_targets_ask_for():
    jobs = plan("standard", kind="cpu", **OPTIONS)
    layers = [job.identity for job in jobs if job.section == "layer"]
    assert {case["model"] for case in layers} == {"SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.1-8B"}
    assert {case["dtype"] for case in layers} == {"float32", "bfloat16"}
    small = [(case["tokens"], case["d_in"]) for case in layers if case["model"] != "Llama-3.1-8B"]
    assert {tokens for tokens, _ in small} == {2048, 512}, "an ordinary batch and a small one"
    for section in ("layer", "heads", "step"):
        assert {job.identity["dropout"] for job in jobs if job.section == section} == {0.1, 0.0}
    assert {(job.identity["d_in"], job.identity["d_out"]) for job in jobs if job.section == "memory"} == {(4096, 11008)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_is_measured_quickly_for_one_prompt_and_else_for_a_batch_and_a_long_prompt(dtype):
    found = {preset: plan(preset, kind="cpu", **{**OPTIONS, "dtype": dtype}, only=["generate"]) for preset in PRESETS}
    cases = {name: {(job.identity["batch"], job.identity["prompt"]) for job in jobs} for name, jobs in found.items()}
    assert cases == {
        "quick": {(1, 32)},
        "standard": {(1, 32), (16, 32), (1, 512)},
        "full": {(1, 32), (16, 32), (1, 512)},
    }
    assert {job.identity["dtype"] for job in found["full"]} == {dtype, "float32"}
    assert {job.settings["tokens"] for job in found["full"] if job.identity["prompt"] == 512} == {1}


@pytest.mark.parametrize("preset", PRESETS)
def test_experts_are_trained_asked_and_decoded(preset):
    jobs = plan(preset, kind="cpu", **OPTIONS, only=["experts"])
    wanted = {("step", 512), ("forward", 16), ("forward", 512), ("decode", 1), ("decode", 16)}
    for dtype in {job.identity["dtype"] for job in jobs}:
        assert {(j.identity["work"], j.identity["tokens"]) for j in jobs if j.identity["dtype"] == dtype} == wanted
    assert sum(job.cost for job in jobs if job.identity["dtype"] == "bfloat16") < (60 if preset != "full" else 120)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_timed_in_a_type_that_is_emulated(preset, kind):
    jobs = [job for job in plan(preset, kind=kind, **IN_FLOAT32) if job.section != "memory"]
    assert {job.identity.get("dtype", "float32") for job in jobs} == {"float32"}
    half = [job for job in plan(preset, kind=kind, **OPTIONS) if job.section != "memory"]
    without_type = [
        {(job.section, *((k, v) for k, v in job.identity.items() if k != "dtype")) for job in some}
        for some in (jobs, half)
    ]
    assert without_type[0] == without_type[1], "the same cases"


def test_the_compiled_loop_takes_part_only_where_there_is_a_compiler():
    def with_compiler(there):
        jobs = plan("standard", kind="cpu", **{**OPTIONS, "compiler": there})
        return [job for job in jobs if "compiled loop" in job.settings.get("names", ())]

    assert with_compiler(True)
    assert not with_compiler(False)


def test_a_gpu_gets_the_layers_and_tokens_of_its_targets():
    cases = [job.identity for job in plan("quick", kind="cuda", only=["layer"], **OPTIONS)]
    assert {(case["model"], case["tokens"], case["dtype"]) for case in cases} == {("Llama-3.1-8B", 8192, "bfloat16")}


def test_the_generated_tasks_are_shipped():
    for name in GENERATED_TASKS:
        assert load_task(name).name == name
