"""Every target is judged by its own ratio, on the right side of its limit."""

from __future__ import annotations

import pytest

from multiflora.bench.table import cells
from multiflora.bench.verdict import TARGETS, verdicts

from .made_results import generate, layer, machine, results, serving, step


def judge(name, measured):
    (found,) = (verdict for verdict in verdicts(measured) if verdict.target.name == name)
    return found


@pytest.mark.parametrize(
    ("name", "values", "floors", "word"),
    [
        # (12 - 10) / (30 - 10) and (16 - 10) / (30 - 10); the products alone: 1 / 20
        ("R-LoRA layer / published loop", [0.1, 0.3], [0.05, 0.05], "held in 1 of 2"),
        ("R-LoRA layer / peft LoRA, dropout 0.1", [0.4], [0.2], "held"),
        ("R-LoRA layer / peft LoRA, dropout 0", [1.2], [0.2], "missed"),
        ("16 heads / 2 heads", [1.1], [None], "held"),
        # one byte a token over (90,000 - 30,400) / 128
        ("memory kept a token / published loop", [128 / 59_600], [None], "held"),
        ("MultiLoRA step / peft LoRA 3r, dropout 0.1", [1100 / 1400], [1000 / 1400], "held"),
        ("MultiLoRA step / peft LoRA 3r, dropout 0", [1100 / 1400], [1000 / 1400], "held"),
        ("R-LoRA step / peft LoRA, dropout 0.1", [1200 / 1500], [1100 / 1500], "missed"),
        ("R-LoRA step / peft LoRA, dropout 0", [1200 / 1500], [1100 / 1500], "held"),
        ("R-LoRA step / frozen model", [1.2, 1.2], [1.1, 1.1], "held"),
        # (12 - 10) / (30 - 10), and (40 - 10) / (30 - 10)
        ("experts: R-LoRA step / peft LoRA", [0.1], [None], "held"),
        ("experts: R-LoRA without gradients / peft LoRA", [0.1, 1.5], [None, None], "held in 1 of 2"),
        ("training speed / SFTTrainer with peft LoRA", [2.0], [None], "held"),
        # 160 tokens a second and 10; 128 of R-LoRA; 80 of the mixed load
        ("served: 16 clients / 1 client", [16.0], [None], "held"),
        ("served: R-LoRA / base", [0.8], [None], "held"),
        ("served: tokens before a short request's first", [2.0], [None], "held"),
        ("served: mixed / one adapter", [0.625], [None], "missed"),
        ("served: memory, last half", [1.01], [None], "held"),
        ("served: base / transformers serve", [1.5], [None], "held"),
        # of 20 ms a token, in the order of the methods; the base model and the products alone: 21
        ("token / base, batch 1", [1.05, 1.05, 1.05, 1.05, 1.2, 1.2], [1.05] * 6, "held in 4 of 6"),
        ("token / base, batch 16", [1.05] * 4, [1.05] * 4, "held"),
        ("token / base, batch 16, gated by task", [1.2, 1.2], [1.05, 1.05], "held"),
        ("token / peft LoRA, batch 1", [0.7, 0.7, 0.7, 0.7, 0.8, 0.8], [0.7] * 6, "held"),
        ("token / peft LoRA, batch 16", [0.7, 0.7, 0.7, 0.7, 0.8, 0.8], [0.7] * 6, "missed"),
        # of 100 ms; the base model and the products alone: 101
        ("prefill of 512 / base", [1.04, 1.04, 1.04, 1.04, 1.12, 1.12], [1.01] * 6, "held in 4 of 6"),
        ("token of 16 heads / 2 heads", [23 / 21, 23 / 21], [1.0, 1.0], "held"),
        ("GPU: R-LoRA layer / peft LoRA", [], [], "not measured"),
        ("GPU: R-LoRA layer / compiled loop", [], [], "not measured"),
        ("GPU: R-LoRA layer / floor", [], [], "not measured"),
    ],
)
def test_each_target(name, values, floors, word):
    verdict = judge(name, results())
    assert [line.estimate.value for line in verdict.lines] == pytest.approx(values)
    assert [line.floor for line in verdict.lines] == [
        floor if floor is None else pytest.approx(floor) for floor in floors
    ]
    assert verdict.word == word


def test_the_parametrisation_above_leaves_no_target_out():
    assert len(TARGETS) == len({target.name for target in TARGETS}) == 29


def test_a_server_is_judged_by_the_wall_and_without_the_opponent_by_the_rest():
    busy = serving()
    busy.seconds["rlora"]["answers"]["cpu"] = [100.0] * 3
    assert judge("served: R-LoRA / base", results(serve=(busy,))).word == "held"
    del busy.seconds["transformers serve"]
    assert judge("served: base / transformers serve", results(serve=(busy,))).word == "not measured"


def test_a_speed_must_be_high_and_a_time_low():
    speed = judge("training speed / SFTTrainer with peft LoRA", results()).target
    time = judge("R-LoRA step / frozen model", results()).target
    assert (speed.held(1.3), speed.held(1.29), speed.bound) == (True, False, "≥ 1.3")
    assert (time.held(1.25), time.held(1.26), time.bound) == (True, False, "≤ 1.25")


def test_the_worst_case_is_the_farthest_on_the_wrong_side():
    verdict = judge("R-LoRA layer / published loop", results())
    assert "dropout 0," in verdict.worst.case
    assert verdict.middle == pytest.approx(0.2)


def test_a_floor_beyond_the_target_is_told():
    # the frozen passes and the products alone take 1100 of the opponent's 1500: 0.55 cannot be reached
    missed = judge("R-LoRA step / peft LoRA, dropout 0.1", results())
    assert missed.out_of_reach == missed.lines
    near = results(steps=(step(0.1, peft=2100.0),))
    assert judge("R-LoRA step / peft LoRA, dropout 0.1", near).out_of_reach == ()


@pytest.mark.parametrize(("products", "floor"), [({}, 1000 / 1400), ({"multilora_products": 150.0}, 1150 / 1400)])
def test_multilora_has_its_own_products_for_a_floor(products, floor):
    verdict = judge("MultiLoRA step / peft LoRA 3r, dropout 0.1", results(steps=(step(0.1, **products),)))
    assert verdict.worst.floor == pytest.approx(floor)


def test_the_clock_decides_which_samples_are_read():
    slow_wall = layer(0.1, packed=12.0)
    slow_wall.seconds["packed"]["backward"]["wall"] = [1.0] * 4
    by_cpu = results(layers=(slow_wall,))
    by_wall = results(layers=(slow_wall,), machine=machine(threads=2))
    name = "R-LoRA layer / published loop"
    assert judge(name, by_cpu).lines[0].estimate.value == pytest.approx(0.1)
    assert judge(name, by_cpu).lines[0].wall == judge(name, by_wall).lines[0].estimate
    assert judge(name, by_wall).word == "missed"


def test_a_gpu_is_judged_on_the_large_layers():
    on_gpu = results(
        machine=machine(kind="cuda"),
        layers=(
            layer(0.1, packed=12.0),
            layer(0.1, packed=11.5, model="Llama-3.1-8B", compiled_loop=12.0),
        ),
    )
    assert [line.estimate.value for line in judge("GPU: R-LoRA layer / floor", on_gpu).lines] == pytest.approx([1.5])
    assert judge("GPU: R-LoRA layer / peft LoRA", on_gpu).word == "held"
    assert judge("GPU: R-LoRA layer / compiled loop", on_gpu).lines[0].estimate.value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("milliseconds", "peft", "word"),
    [
        # of 1500; the limit is .9, the floor .73, and the upper quartiles are .82, .92, .94, .93
        ([1100.0, 1200.0, 1200.0, 1300.0], 1500.0, "held"),
        ([1200.0, 1300.0, 1300.0, 1600.0], 1500.0, "held (1 too close to tell)"),
        ([1300.0, 1350.0, 1400.0, 1450.0], 1500.0, "missed (1 too close to tell)"),
        ([1400.0, 1400.0, 1400.0, 1400.0], 1500.0, "missed"),
        # of 1200 the frozen passes and the products alone are .92
        ([800.0, 1150.0, 1150.0, 1300.0], 1200.0, "missed (1 out of reach)"),
    ],
)
def test_what_is_too_close_to_tell_is_told(milliseconds, peft, word):
    measured = step(0.0, peft=peft)
    measured.seconds["packed"]["forward"]["cpu"] = [0.0] * 4
    measured.seconds["packed"]["backward"]["cpu"] = [1e-3 * value for value in milliseconds]
    verdict = judge("R-LoRA step / peft LoRA, dropout 0", results(steps=(measured,)))
    assert cells(verdict)[-1] == word
    assert bool(verdict.undecided) == ("too close" in word)


def test_a_row_of_the_table():
    rows = {row[0]: row for row in map(cells, verdicts(results()))}
    assert rows["16 heads / 2 heads"][1:] == ("≤ 1.15", "1.10", "1.10", "", "held")
    assert rows["memory kept a token / published loop"][2:4] == ("0.0021", "0.0021")
    assert rows["GPU: R-LoRA layer / floor"][-1] == "not measured (no GPU)"


def test_a_server_cannot_be_faster_than_its_model():
    alone = [generate(1).model_copy(update={"dtype": "float32"}), generate(16, base=60.0)]
    alone[1] = alone[1].model_copy(update={"dtype": "float32"})
    served = judge("served: 16 clients / 1 client", results(generate=tuple(alone), serve=(serving(),)))
    # a prefill of 200 ms on the wall, and 19 more tokens of 40 or of 120 ms
    assert [line.floor for line in served.lines] == [pytest.approx(16 * (0.2 + 19 * 0.04) / (0.2 + 19 * 0.12))]
    assert len(served.out_of_reach) == 0
    dear = alone[1].model_copy(update={"seconds": generate(16, base=160.0).seconds})
    served = judge("served: 16 clients / 1 client", results(generate=(alone[0], dear), serve=(serving(),)))
    assert len(served.out_of_reach) == 1
