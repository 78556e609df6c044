"""Counts from a method's description: the papers' numbers, the real model's, and ranks that meet a target."""

from __future__ import annotations

import pytest
import torch
from made_adapters import BETWEEN
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from multiflora.comparison.budget import (
    Width,
    adapted_widths,
    count_flops,
    count_parameters,
    has_rank,
    solve_rank,
    with_rank,
)
from multiflora.errors import ConfigError
from multiflora.estimate import count_parameters as count_on_model
from multiflora.methods import METHODS, MethodCard, build_config, describe
from multiflora.methods.baselines import BASELINES, Baseline

RANKED = [name for name in METHODS if has_rank(name)]
OURS = [name for name, card in METHODS.items() if card.module]
TASKS = {"num_tasks": 3, "task_names": ["a", "b", "c"]}


def mlp_layers(layers: int, width: int, inner: int) -> list[Width]:
    """gate, up and down projections of a Llama-like model."""
    shapes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    return [Width(f"layers.{i}.mlp.{name}", *shape) for i in range(layers) for name, shape in shapes.items()]


QWEN_7B, QWEN_7B_SIZE = mlp_layers(28, 3584, 18944), 7_615_616_512
QWEN_3B, QWEN_3B_SIZE = mlp_layers(36, 2048, 11008), 3_085_938_688


def settings_of(name: str) -> dict[str, object]:
    return {"target_modules": "all-linear", **(TASKS if METHODS[name].module else {})}


@pytest.mark.parametrize(
    ("name", "settings", "published"),
    [
        # Align-LoRA's table; methods-spec 3.6
        ("rlora", {"r": 4, "num_heads": 3}, 0.2502),
        ("hydralora", {"r": 4, "num_heads": 3}, 0.2502),
        ("mlora", {"r": 4, "num_heads": 3}, 0.2214),
        ("lora", {"r": 4}, 0.099),
        ("lora", {"r": 8}, 0.199),
        ("lora", {"r": 10}, 0.249),
    ],
)
def test_published_share_of_qwen_7b(name, settings, published):
    share = 100 * count_parameters(describe(name), build_config(name, settings), QWEN_7B) / QWEN_7B_SIZE
    assert share == pytest.approx(published, abs=0.0006)


@pytest.mark.parametrize(("name", "published"), [("rlora", 0.460), ("mlora", 0.407)])
def test_published_share_of_qwen_3b(name, published):
    config = build_config(name, {"r": 4, "num_heads": 3})
    assert 100 * count_parameters(describe(name), config, QWEN_3B) / QWEN_3B_SIZE == pytest.approx(published, abs=6e-4)


def test_multilora_abstract_on_llama_7b():
    # n = 3 modules of rank 32 on q, k, v, up and down: the 2.5 % of the abstract (methods-spec 1.3)
    one = [Width("q", 4096, 4096)] * 3 + [Width("up", 4096, 11008), Width("down", 11008, 4096)]
    config = build_config("multilora", {"r": 32, "num_modules": 3})
    share = 100 * count_parameters(describe("multilora"), config, one * 32) / 6_738_415_616
    assert share == pytest.approx(2.54, abs=0.01)


@pytest.mark.parametrize(("name", "words"), [*((name, {}) for name in RANKED), *(("parts", w) for w in BETWEEN)])
def test_counts_of_the_real_model(name, words, tiny_llama):
    base = tiny_llama(num_key_value_heads=2)
    settings = settings_of(name) | words
    widths = adapted_widths(base.config, settings)
    config = build_config(name, settings)
    expected = count_parameters(describe(name), config, widths)
    assert expected == count_on_model(get_peft_model(base, config))[0]


def test_what_is_frozen_is_computed_and_not_counted(tiny_llama):
    base, settings = tiny_llama(), {"stem": "own", "target_modules": "all-linear"}
    frozen, widths = {**settings, "frozen": ["A", "B"]}, adapted_widths(base.config, settings)
    config, method = build_config("parts", frozen), describe("parts")
    assert count_parameters(method, config, widths) == count_on_model(get_peft_model(base, config))[0]
    free, held = (count_flops(method, build_config("parts", each), widths) for each in (settings, frozen))
    assert free.forward == held.forward
    factors = sum(2 * 3 * 8 * (width.d_in + width.d_out) for width in widths)
    assert free.training - held.training == factors  # the products that would be A's and B's gradients


@pytest.mark.parametrize("name", ["lora", "rlora", "multilora"])
def test_counts_follow_the_rank_pattern(name, tiny_llama):
    base = tiny_llama()
    settings = {**settings_of(name), "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}}
    config = build_config(name, settings)
    expected = count_parameters(describe(name), config, adapted_widths(base.config, settings))
    assert expected == count_on_model(get_peft_model(base, config))[0]


def _addmm_in_place(y, a, b, out_val=None, **_) -> int:
    """torch's counter knows addmm, but not the form that adds into its first argument."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize(("name", "words"), [*((name, {}) for name in OURS), *(("parts", w) for w in BETWEEN)])
def test_flops_are_those_torch_counts(name, words):
    tokens, layer = 5000, Width("0", 24, 40)
    settings = {"target_modules": ["0"], "r": 8, **TASKS, **words}
    model = get_peft_model(nn.Sequential(nn.Linear(layer.d_in, layer.d_out)), build_config(name, settings)).eval()
    x = torch.randn(tokens, layer.d_in, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_in_place}) as counter:
        model(x, task_id=torch.zeros(tokens, dtype=torch.long)).sum().backward()
    base = 2 * 2 * tokens * layer.d_in * layer.d_out  # forward, and the gradient of the input
    measured = (counter.get_total_flops() - base) / tokens
    counted = count_flops(describe(name), build_config(name, settings), [layer]).training
    # the counter does not see elementwise work (H r a token), we leave out what is done once a step
    assert measured == pytest.approx(counted, rel=0.02)


def test_flops_of_a_router_by_hand():
    flops = count_flops(describe("hydralora"), build_config("hydralora", {"r": 4, "num_heads": 3}), [Width("", 10, 20)])
    # methods-spec 2.3: 2 r d_in + 2 N d_in + N r + 2 N r d_out
    assert flops.forward == 2 * 4 * 10 + 2 * 3 * 10 + 3 * 4 + 2 * 3 * 4 * 20
    assert flops.training == 3 * flops.forward


def test_flops_of_the_offset_have_no_weight_gradient():
    widths = [Width("", 10, 20)]
    rlora = count_flops(describe("rlora"), build_config("rlora", {"r": 4, "num_heads": 3}), widths)
    hydra = count_flops(describe("hydralora"), build_config("hydralora", {"r": 4, "num_heads": 3}), widths)
    offset = 2 * 4 * (10 + 20)
    assert rlora.forward - hydra.forward == offset
    assert rlora.training - hydra.training == 2 * offset


@pytest.mark.parametrize("equal", ["parameters", "flops"])
@pytest.mark.parametrize("name", RANKED)
def test_solved_rank_is_the_nearest(name, equal):
    settings = {key: value for key, value in settings_of(name).items() if key != "target_modules"}
    target = 60_000_000 if equal == "parameters" else 400_000_000
    solved = solve_rank(name, settings, QWEN_7B, target, equal=equal)
    measure = count_parameters if equal == "parameters" else (lambda *a: count_flops(*a).training)
    method, step = describe(name), {"moelora": 8}.get(name, 1)

    def off(rank: int) -> int:
        return abs(measure(method, build_config(name, with_rank(name, settings, rank)), QWEN_7B) - target)

    assert off(solved.rank) <= min(off(solved.rank + step), off(max(solved.rank - step, step)))
    reached = solved.parameters if equal == "parameters" else solved.flops.training
    assert reached == pytest.approx(target, rel=0.2)


def test_rank_of_a_share_that_lora_reaches():
    target = count_parameters(describe("rlora"), build_config("rlora", {"r": 4, "num_heads": 3}), QWEN_7B)
    assert solve_rank("lora", {}, QWEN_7B, target).rank == 10  # as Align-LoRA compares them


def test_the_smallest_target_gives_the_smallest_rank():
    assert solve_rank("lora", {}, QWEN_7B, 1).rank == 1
    assert solve_rank("moelora", {"num_experts": 3, **TASKS}, QWEN_7B, 1).rank == 3


def test_alpha_follows_the_rank():
    assert with_rank("rlora", {}, 10)["lora_alpha"] == 80  # 32 at r = 4
    assert with_rank("rlora", {}, 10, scale=2.0)["lora_alpha"] == 20
    assert with_rank("rlora", {"use_rslora": True}, 16)["lora_alpha"] == pytest.approx(32 / 2 * 4)
    assert with_rank("rlora", {"lora_alpha": 7}, 10)["lora_alpha"] == 7


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean multilora"):
        describe("multi-lora")


def test_a_baseline_may_have_words_of_its_own_for_rank_and_alpha(monkeypatch):
    card = MethodCard("loha", "LoHa", "", "", (), "exactly", "LoHaConfig")
    monkeypatch.setitem(METHODS, "loha", card)
    monkeypatch.setitem(BASELINES, "loha", Baseline(card, alpha_key="alpha"))
    assert with_rank("loha", {}, 32, scale=2.0) == {"r": 32, "alpha": 64.0}
    assert with_rank("loha", {"alpha": 3.0}, 32) == {"r": 32, "alpha": 3.0}
    monkeypatch.setitem(BASELINES, "loha", Baseline(card, alpha_key=None))
    assert with_rank("loha", {}, 32, scale=2.0) == {"r": 32}
