"""The losses between tasks and between heads against loops written from their papers, in float64, with gradients."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from multiflora.methods.losses import alignment, entropy, load_balance, overlap


def kl(mean_1, variance_1, mean_2, variance_2):
    """D(N(1) || N(2)) of Gaussians with independent coordinates."""
    total = 0
    for a, v, b, w in zip(mean_1, variance_1, mean_2, variance_2, strict=True):
        total = total + 0.5 * (torch.log(w / v) + v / w + (a - b) ** 2 / w - 1)
    return total


def plain_alignment(stems, tasks, num_tasks, keep):
    """Mean symmetric KL over the pairs of tasks that are there."""
    moments = []
    for task in range(num_tasks):
        rows = [x for x, t, k in zip(stems, tasks, keep, strict=True) if t == task and k]
        if len(rows) > 1:
            own = torch.stack(rows)
            moments.append((own.mean(0), own.var(0) + 1e-8))
    pairs = [(kl(*one, *two) + kl(*two, *one)) / 2 for one, two in combinations(moments, 2)]
    return sum(pairs) / len(pairs) if pairs else torch.zeros((), dtype=stems.dtype)


def plain_load_balance(logits, k, keep):
    """N Σ_h F_h P_h with the shares of all k choices."""
    heads = logits.shape[1]
    rows = [row for row, kept in zip(logits, keep, strict=True) if kept]
    shares = [0.0] * heads
    for row in rows:
        for h in sorted(range(heads), key=lambda h: -float(row[h]))[:k]:
            shares[h] += 1 / (k * len(rows))
    probabilities = sum(torch.softmax(row, 0) for row in rows) / len(rows)
    return heads * sum(share * p for share, p in zip(shares, probabilities, strict=True))


def gate_of(logits, k):
    """1/k for the k largest."""
    chosen = logits.topk(k, 1).indices
    return torch.zeros_like(logits).scatter(1, chosen, 1 / k)


def same_with_gradients(x, ours, theirs):
    assert (ours - theirs).abs() < 1e-10 * max(1.0, float(theirs.detach().abs()))
    mine, other = torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0]
    assert (mine - other).abs().max() < 1e-10 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("tasks", [[0, 1, 2], [0, 2], [1, 1, 0]])
def test_alignment(tasks):
    torch.manual_seed(0)
    x = torch.randn(24, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor(tasks).repeat(24)[:24]
    for keep in (torch.ones(24), torch.tensor([1, 1, 0, 1]).repeat(6)):
        same_with_gradients(x, alignment(x, ids, 3, keep), plain_alignment(x, ids, 3, keep))
    assert torch.equal(alignment(x, ids, 3, None), alignment(x, ids, 3, torch.ones(24)))


def test_alignment_of_two_tokens_each():
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids, keep = torch.tensor([0, 1, 0, 1, 2]), torch.ones(5)
    same_with_gradients(x, alignment(x, ids, 3, keep), plain_alignment(x, ids, 3, keep))


def test_alignment_of_one_task_or_single_tokens_is_nothing():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for ids in ([1] * 6, [0, 1, 1, 1, 1, 1]):
        loss = alignment(x, torch.tensor(ids), 3, None)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, x)[0].any()


def test_alignment_does_not_see_the_scale_and_falls_as_tasks_come_together():
    torch.manual_seed(0)
    x, ids = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 2
    apart = torch.where(ids.bool().unsqueeze(1), x + 3, x)
    assert alignment(7 * apart, ids, 2, None).item() == pytest.approx(alignment(apart, ids, 2, None).item(), rel=1e-5)
    values = [alignment(x + gap * ids.unsqueeze(1), ids, 2, None).item() for gap in (4.0, 2.0, 1.0)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("k", [2, 3])
def test_load_balance(k):
    torch.manual_seed(0)
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    for keep in (torch.ones(9), torch.tensor([1, 0, 1] * 3)):
        same_with_gradients(logits, load_balance(logits, gate_of(logits, k), keep), plain_load_balance(logits, k, keep))


def test_load_balance_is_one_when_even_and_more_when_not():
    even = torch.full((4, 4), -9.0, dtype=torch.float64)
    for token in range(4):
        even[token, token] = even[token, (token + 1) % 4] = 9.0
    assert load_balance(even, gate_of(even, 2), None).item() == pytest.approx(1)
    one_sided = even[:1].expand(4, 4)
    assert load_balance(one_sided, gate_of(one_sided, 2), None).item() == pytest.approx(2, rel=1e-3)


def test_entropy_is_that_of_each_real_token():
    torch.manual_seed(0)
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    for keep in (torch.ones(9), torch.tensor([1, 0, 1] * 3)):
        rows = [torch.softmax(row, 0) for row, kept in zip(logits, keep, strict=True) if kept]
        plain = sum(-(p * torch.log(p)).sum() for p in rows) / len(rows)
        same_with_gradients(logits, entropy(logits, keep), plain)
    assert torch.equal(entropy(logits, None), entropy(logits, torch.ones(9)))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_overlap_is_d2mora_s_loop_over_all_pairs(n):
    torch.manual_seed(0)
    stack = torch.randn(n, 3, 4, dtype=torch.float64, requires_grad=True)
    unit = [matrix.reshape(-1) / (matrix.norm() + 1e-6) for matrix in stack]
    plain = sum((torch.dot(one, other).abs() for one, other in combinations(unit, 2)), 0 * stack.sum())
    same_with_gradients(stack, overlap(stack), plain)


def test_overlap_of_heads_at_zero_is_nothing_and_of_equal_ones_all():
    heads = torch.zeros(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(overlap(heads), heads)[0].any()
    assert float(overlap(torch.ones(3, 4, 2, dtype=torch.float64))) == pytest.approx(3, rel=1e-5)
