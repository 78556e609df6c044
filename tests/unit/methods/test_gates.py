"""What each gate makes of logits, tasks and its own parameters, by hand; and how these parameters start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from multiflora.methods.gates import (
    FixedGate,
    Gate,
    LargestGate,
    ScaleGate,
    StemRouter,
    TaskEmbeddingGate,
    TaskTemperatureGate,
    TokenRouter,
)
from multiflora.methods.initial import sparse

CONFIG = SimpleNamespace(top_k=None, init_weights=True, num_tasks=3, task_embedding_dim=5, temperature=0.5)
TOP_2 = SimpleNamespace(**vars(CONFIG) | {"top_k": 2})
RANDOM = SimpleNamespace(**vars(CONFIG) | {"init_weights": False})
LOGITS = torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 2.0]])  # three heads, two tokens


def started(gate, config, heads=4, d_in=600, d_out=400):
    torch.manual_seed(0)
    parts = {name: torch.full(shape, 7.0) for name, shape in gate.shapes(config, heads, d_in, d_out).items()}
    gate.start(config, parts, None)
    return parts


def test_a_gate_that_reads_nothing():
    gate, B = Gate(), torch.randn(4, 6)
    assert gate.shapes(CONFIG, 3, 8, 4) == {}
    assert gate.weights(CONFIG, {}, None, None) is None
    assert gate.left_to_op(CONFIG)
    assert torch.equal(gate.constant(CONFIG, {}, 3, None), torch.ones(3))
    assert gate.fold(CONFIG, {}, B) is B
    assert torch.equal(FixedGate(value=lambda config: 0.25).fold(CONFIG, {}, B), B / 4)
    assert FixedGate().fold(CONFIG, {}, B) is B


def test_a_scale_for_each_head_and_feature():
    gate, B = ScaleGate(), torch.randn(4, 6)  # three heads of rank two
    assert gate.shapes(CONFIG, 3, 8, 4) == {"scale": (3, 4)}
    scale = torch.randn(3, 4)
    folded = gate.fold(CONFIG, {"scale": scale}, B)
    for h in range(3):
        assert torch.allclose(folded[:, 2 * h : 2 * h + 2], scale[h].unsqueeze(1) * B[:, 2 * h : 2 * h + 2])
    assert not started(gate, CONFIG)["scale"].any()
    assert started(gate, RANDOM)["scale"].std() == pytest.approx(1, rel=0.1)


def test_a_router_weighs_all_heads_or_the_best():
    gate = TokenRouter()
    assert gate.shapes(CONFIG, 3, 8, 4) == {"router": (3, 8)}
    assert torch.allclose(gate.weights(CONFIG, {}, LOGITS, None), torch.softmax(LOGITS, 0))
    assert gate.left_to_op(CONFIG)
    assert not gate.left_to_op(TOP_2)
    best = gate.weights(TOP_2, {}, LOGITS, None)
    assert (best == 0).tolist() == [[False, True], [False, False], [True, False]]
    assert torch.allclose(best[:2, 0], torch.softmax(LOGITS[:2, 0], 0))
    assert torch.allclose(best[1:, 1], torch.softmax(LOGITS[1:, 1], 0))
    assert gate.weights(CONFIG, {}, LOGITS.bfloat16(), None).dtype == torch.float32


def test_how_a_router_starts():
    bound = 600**-0.5
    for gate, config in (
        (TokenRouter(), CONFIG),
        (TokenRouter(zero=lambda config: True), RANDOM),
        (TokenRouter(std=lambda config: 3.0), RANDOM),
        (StemRouter(), CONFIG),
    ):
        router = started(gate, config)[gate.names[0]]
        assert 0.9 * bound < router.abs().max() <= bound
    assert not started(TokenRouter(zero=lambda config: True), CONFIG)["router"].any()
    assert started(TokenRouter(std=lambda config: 3.0), CONFIG)["router"].std() == pytest.approx(3, rel=0.1)


def test_scores_of_each_head_by_itself():
    gate = TokenRouter(sigmoid=lambda config: True)
    assert not gate.left_to_op(CONFIG)
    scores = torch.sigmoid(LOGITS)
    assert torch.allclose(gate.weights(CONFIG, {}, LOGITS, None), scores / scores.sum(0))
    best = gate.weights(TOP_2, {}, LOGITS, None)
    assert torch.allclose(best[:, 0], torch.tensor([*(scores[:2, 0] / scores[:2, 0].sum()), 0.0]))
    far = torch.tensor([[-200.0], [-200.0]], requires_grad=True)  # whose sigmoids are all 0
    weights = gate.weights(CONFIG, {}, far, None)
    assert torch.allclose(weights, torch.full((2, 1), 0.5))
    assert torch.autograd.grad(weights[0, 0], far)[0].isfinite().all()


def test_a_router_on_what_the_heads_read():
    gate, v = StemRouter(), torch.randn(2, 5)
    assert gate.shapes(CONFIG, 3, 2, 4) == {"stem_router": (3, 2)}
    assert gate.of_stem
    assert not gate.left_to_op(CONFIG)
    router = torch.randn(3, 2)
    logits = gate.look({"stem_router": router}, 4 * v, 3, 4.0, torch.matmul)
    assert torch.allclose(logits, router @ v, atol=1e-6)  # A x, whatever the scale


def test_the_largest_heads_have_weight_one():
    gate = LargestGate()
    assert gate.shapes(CONFIG, 3, 2, 4) == {}
    assert gate.reads == "token"
    assert not gate.left_to_op(TOP_2)
    v = torch.tensor([[3.0, 0.1], [4.0, 0.0], [-6.0, 0.0], [0.0, 1.0], [0.0, 2.0], [4.5, 2.0]], requires_grad=True)
    logits = gate.look({}, v, 3, 2.0, torch.matmul)  # three heads of rank two
    assert torch.allclose(logits, torch.tensor([[2.5, 0.05], [3.0, 0.5], [2.25, 2**0.5]]))
    assert not logits.requires_grad
    assert gate.weights(TOP_2, {}, logits, None).tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    assert gate.look({}, v[:, :0], 3, 2.0, torch.matmul).shape == (3, 0)


def test_a_sparse_projection():
    torch.manual_seed(0)
    A = torch.full((40, 60), 7.0)
    sparse(A, 15, 0.25)
    assert ((A != 0).sum(1) == 15).all()
    assert A[A != 0].std() == pytest.approx(0.25, rel=0.1)
    assert len({tuple(row.nonzero().flatten().tolist()) for row in A}) == 40  # each row's own places


def test_weights_by_task():
    gate = TaskTemperatureGate()
    assert gate.shapes(CONFIG, 4, 8, 4) == {"task_logits": (3, 4)}
    parts = {"task_logits": torch.randn(3, 4)}
    table = torch.softmax(parts["task_logits"] / 0.5, 1)
    assert torch.allclose(gate.table(CONFIG, parts), table)
    assert torch.allclose(gate.weights(CONFIG, parts, None, torch.tensor([2, 0])), table[[2, 0]].t())
    assert torch.allclose(gate.constant(CONFIG, parts, 4, 1), table[1])
    assert not gate.left_to_op(CONFIG)
    assert gate.table(CONFIG, {"task_logits": parts["task_logits"].bfloat16()}).dtype == torch.float32
    assert 0.4 < started(gate, CONFIG)["task_logits"].abs().max() <= 0.5  # the root of four heads


def test_weights_by_the_task_s_embedding():
    gate = TaskEmbeddingGate()
    assert gate.shapes(CONFIG, 4, 8, 4) == {"task_embedding": (3, 5), "task_router": (4, 5)}
    parts = {"task_embedding": torch.randn(3, 5), "task_router": torch.randn(4, 5)}
    table = torch.softmax(parts["task_embedding"] @ parts["task_router"].t(), 1)
    assert torch.allclose(gate.table(CONFIG, parts), table)
    assert torch.allclose(gate.constant(CONFIG, parts, 4, 2), table[2])
    half = {name: part.bfloat16() for name, part in parts.items()}
    assert gate.table(CONFIG, half).dtype == torch.float32
    wide = SimpleNamespace(**vars(CONFIG) | {"num_tasks": 40, "task_embedding_dim": 50})
    made = started(gate, wide)
    assert made["task_embedding"].std() == pytest.approx(1, rel=0.1)
    assert 0.9 * 50**-0.5 < made["task_router"].abs().max() <= 50**-0.5
