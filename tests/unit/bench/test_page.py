"""The page is made of the samples and of nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multiflora.bench.page import write_page
from multiflora.bench.results import load
from multiflora.bench.verdict import TARGETS

from .made_results import generate, layer, machine, made, results, serving, step

DOCS = Path(__file__).parents[3] / "docs"


def test_equal_results_give_equal_files(tmp_path):
    for folder in ("one", "two"):
        write_page(results(), tmp_path / folder / "performance.md")
    for name in ("performance.md", "performance/layers.svg", "performance/steps.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_it_tells_targets_misses_floor_and_profile(tmp_path):
    write_page(results(), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    assert "| R-LoRA step / peft LoRA, dropout 0.1 | ≤ 0.55 | 0.80 | 0.80 | 0.73 | missed (1 out of reach) |" in page
    assert "Cases in which the floor alone is beyond the target: 1 of 1." in page
    assert "| `aten::mul` | 2.00 |  |" in page
    assert "Some Processor" in page
    assert "torch 2.13.0" in page
    for name in re.findall(r"\]\(<(.*?)>\)", page):
        assert (tmp_path / name).is_file()


def test_it_tells_what_was_served_and_why_the_opponent_was_not(tmp_path):
    write_page(results(serve=(serving(left_out="A server did not start: no fastapi."),)), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    assert "| base, 1 client | 160 | 10 (10 to 10) | 10.0 |" in page
    assert "| R-LoRA, 16 clients | 320 | 128 (128 to 128) | 0.8 |" in page
    assert "first token came after 1, 2, 2, 9 of its tokens" in page
    assert "After 500 short requests the server held 900.00 MB, after 1,000 1,010.00 MB." in page
    assert "`transformers serve` was not measured: A server did not start: no fastapi." in page


def test_generation_is_told_by_token_with_its_floor(tmp_path):
    write_page(results(generate=(generate(16),)), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8").partition("## Generation")[2]
    assert "SmolLM2-135M, bfloat16, batch 16, prompt of 32 tokens:" in page
    assert "| base | 20.0 |  | 100.0 |  |  |" in page
    assert "| rlora | 21.0 | 1.05 (1.05 to 1.05) | 104.0 | 1.04 (1.04 to 1.04) | 8,000,000 |" in page
    assert "| peft LoRA | 30.0 | 1.50 (1.50 to 1.50) |" in page
    assert "| floor | 21.0 | 1.05 (1.05 to 1.05) | 101.0 | 1.01 (1.01 to 1.01) |  |" in page


def test_experts_are_told_beside_the_frozen_ones(tmp_path):
    write_page(results(), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    section = page.partition("## Experts of a mixture")[2].partition("## ")[0]
    assert "32 of width 512 on a model of width 1024, 8 for each token, as a mixture has them" in section
    ratios = "1.20 (1.20 to 1.20) | 3.00 (3.00 to 3.00) | 0.10 (0.10 to 0.10)"
    assert f"| a mixture, training step of 512 tokens, bfloat16 | 10.00 | {ratios} |" in section
    assert f"| a mixture, decoding of 1 token, bfloat16 | 10.00 | {ratios} |" in section
    missed = page.partition("### experts: R-LoRA without gradients / peft LoRA")[2].partition("### ")[0]
    assert "| a mixture, forward of 512 tokens, bfloat16 | 1.50" in missed
    assert "| `aten::mm` | 10.00 | 9.00 |" in missed


def test_a_profile_of_rlora_is_not_shown_for_multilora(tmp_path):
    slow = step(0.1, multilora=1390.0)
    write_page(results(steps=(slow,)), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    section = page.partition("### MultiLoRA step / peft LoRA 3r, dropout 0.1")[2].partition("### ")[0]
    assert "| SmolLM2-135M, 2 × 256 tokens, bfloat16, dropout 0.1 | 0.99" in section
    assert "profiler" not in section
    seen = slow.model_copy(update={"profile": {**slow.profile, "multilora": {"aten::mm": 0.95}}})
    write_page(results(steps=(seen,)), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    section = page.partition("### MultiLoRA step / peft LoRA 3r, dropout 0.1")[2].partition("### ")[0]
    assert "| operator | MultiLoRA, packed | frozen |" in section
    assert "| `aten::mm` | 950.00 | 900.00 |" in section


def test_every_table_has_a_cell_for_every_column(tmp_path):
    write_page(results(), tmp_path / "performance.md")
    lines = (tmp_path / "performance.md").read_text("utf-8").splitlines()
    tables = 0
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|[-:|]+\|", line):
            tables += 1
            j = i - 1
            while j < len(lines) and lines[j].startswith("|"):
                assert lines[j].count("|") == line.count("|"), lines[j]
                j += 1
            assert j > i + 1, f"an empty table below {lines[i - 1]}"
    assert tables >= 11


def test_a_part_is_a_page_too(tmp_path):
    sections = ("layers", "heads", "memory", "shared", "experts", "steps", "training", "generate", "serve")
    write_page(results(**dict.fromkeys(sections, ())), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    assert page.count("not measured") == len(TARGETS)
    assert "## Generation" not in page
    assert "## Layers" not in page
    assert "## Where a target is missed" not in page
    assert not list((tmp_path / "performance").iterdir())


@pytest.mark.parametrize(("threads", "words"), [(1, "own processor time"), (2, "is the one on the wall")])
def test_it_says_which_clock_was_read(tmp_path, threads, words):
    write_page(results(machine=machine(threads=threads)), tmp_path / "performance.md")
    assert words in (tmp_path / "performance.md").read_text("utf-8")


def test_it_says_how_many_rounds_there_were(tmp_path):
    longer = layer(0.1, packed=2.0).model_copy(
        update={"seconds": made(61, frozen=10, packed=12, peft=15, loop=30, products=1)}
    )
    write_page(results(layers=(*results().layers, longer)), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    wanted = (
        "layers 4 to 61, numbers of heads 4, shared inputs 4, experts 4, steps 4, training 3, generation 4, serving 3."
    )
    assert f"- **Rounds:** {wanted}" in page


def test_it_says_that_bfloat16_is_emulated(tmp_path):
    for native in (True, False):
        write_page(results(machine=machine(native_bf16=native)), tmp_path / f"{native}.md")
    assert "float32.**" not in (tmp_path / "True.md").read_text("utf-8")
    page = (tmp_path / "False.md").read_text("utf-8")
    assert page.startswith("# Performance in float32\n\n")
    assert "emulates it at 2.00 of the speed of float32" in page
    assert "--report docs/False/results.json --page docs/False.md" in page


@pytest.mark.parametrize("page", ["performance", "performance-float32"])
def test_a_page_in_docs_is_the_one_its_samples_make(page, tmp_path):
    write_page(load(DOCS / page / "results.json"), tmp_path / f"{page}.md")
    assert (tmp_path / f"{page}.md").read_text("utf-8") == (DOCS / f"{page}.md").read_text("utf-8"), (
        f"multiflora bench --report docs/{page}/results.json --page docs/{page}.md"
    )


def test_where_a_token_goes_is_told_beside_the_base_model(tmp_path):
    slow = generate(1, rlora=26.0).model_copy(update={"profile": {"base": {"aten::mm": 0.1}, "rlora": {"infer": 0.2}}})
    write_page(results(generate=(slow,)), tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text("utf-8")
    section = page.partition("### token / base, batch 1")[2].partition("### ")[0]
    assert "| operator | R-LoRA, prepared | base model |" in section
    assert "| `infer` | 200.00 |  |" in section
