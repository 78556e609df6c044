"""What layers add to a loss: how much of it, into which outputs, and once however a training takes it."""

from __future__ import annotations

import pytest
import torch

from multiflora import AdapterError
from multiflora.auxiliary_losses import pulled, total_of, with_loss
from multiflora.forward_pass import Pass

LABELS = torch.tensor([[5, 6, 7], [-100, -100, 8]])  # three tokens are predicted


def of_layers(**adapters):
    found = Pass(None)
    found.with_gradient = True
    found.losses = {
        name: [torch.tensor(value, requires_grad=True) for value in values] for name, values in adapters.items()
    }
    return found


def test_a_mean_over_layers_for_each_adapter():
    assert float(total_of(of_layers(a=[1.0, 3.0]))) == 2
    assert float(total_of(of_layers(a=[1.0, 3.0], b=[5.0]))) == 7


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ({}, 1),
        ({"labels": LABELS}, 1),
        ({"num_items_in_batch": 6}, 1),
        ({"labels": LABELS, "num_items_in_batch": 6}, 0.5),
        ({"labels": LABELS, "num_items_in_batch": torch.tensor(12)}, 0.25),
        ({"labels": LABELS, "num_items_in_batch": 0}, 3),
        ({"labels": None, "num_items_in_batch": 6}, 1),
    ],
)
def test_a_batch_adds_its_part_of_the_step(words, share):
    found = of_layers(a=[1.0, 3.0])
    output = with_loss({"loss": torch.tensor(10.0), "logits": 1}, found, words)
    assert float(output["loss"]) == pytest.approx(10 + 2 * share)
    assert output["logits"] == 1
    assert found.counted == "loss"


def test_outputs_that_are_tuples():
    found = of_layers(a=[1.0])
    whole = with_loss((torch.tensor(10.0), "logits"), found, {"labels": LABELS})
    assert (float(whole[0]), whole[1:]) == (11, ("logits",))
    for words in ({}, {"labels": None}):  # the first is no loss then
        output = (torch.tensor(10.0), "logits")
        assert with_loss(output, of_layers(a=[1.0]), words) is output


@pytest.mark.parametrize(
    "output",
    [{"logits": torch.ones(2)}, {"loss": None}, {"loss": torch.ones(2)}, {"loss": torch.tensor(1)}, torch.tensor(1.0)],
)
def test_outputs_without_a_loss_stay_as_they_are(output):
    found = of_layers(a=[1.0])
    assert with_loss(output, found, {"labels": LABELS}) is output
    assert found.counted == ""


def gradients(found):
    return [None if one.grad is None else float(one.grad) for losses in found.losses.values() for one in losses]


@pytest.mark.parametrize("take", ["loss", "asked", "both"])
def test_it_counts_once(take):
    found = of_layers(a=[1.0, 3.0])
    loss = with_loss({"loss": torch.tensor(10.0)}, found, {})["loss"]
    assert float(found.asked) == 0
    {"loss": loss, "asked": found.asked, "both": loss + found.asked}[take].backward()
    assert gradients(found) == [0.5, 0.5]
    assert [bool(one) for one in found.reached] == [True]


def test_a_loss_that_is_weighed_at_nothing_has_not_been_reached():
    found = of_layers(a=[1.0, 3.0])
    (0 * with_loss({"loss": torch.tensor(10.0)}, found, {})["loss"]).backward()
    assert [bool(one) for one in found.reached] == [False]


@pytest.mark.parametrize(
    ("weights", "pull"),
    [
        ([[-0.25, -0.25], [-0.25, 0.0]], 0.375),  # a mean over tokens, the last of which is fill
        ([[-0.5, -0.25], [-0.25, 0.0]], 0),  # a preference
        ([[0.25, 0.25], [0.25, 0.0]], 0),
        ([[0.0, 0.0], [0.0, 0.0]], 0),
    ],
)
def test_a_mean_of_log_probabilities_takes_it_with_its_weight(weights, pull):
    found = of_layers(a=[1.0, 3.0])
    probs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    output = with_loss({"loss": torch.tensor(10.0), "log_probs": probs * 1}, found, {})
    (output["log_probs"] * torch.tensor(weights)).sum().backward()
    assert torch.equal(probs.grad, torch.tensor(weights))
    assert gradients(found) == [pytest.approx(pull)] * 2


def test_losses_without_gradient():
    found = of_layers(a=[1.0])
    found.losses["a"] = [one.detach() for one in found.losses["a"]]
    (3 * total_of(found)).backward()  # blocks that are computed again get it by `pull`
    assert float(found.pull["a"]) == 3
    found.losses["a"] *= 2
    (3 * total_of(found)).backward()
    assert float(found.pull["a"]) == 1.5
    found.with_gradient = False
    with torch.no_grad():
        assert float(total_of(found)) == 1
    with pytest.raises(AdapterError, match=r"carry no gradient although the model is training"):
        total_of(found)


def test_a_layer_s_output_brings_its_loss_a_gradient():
    y, loss = torch.ones(2, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    out = pulled(y, loss, torch.tensor(0.25))
    assert torch.equal(out, y)
    (out * torch.tensor([1.0, 2.0])).sum().backward()
    assert y.grad.tolist() == [1, 2]
    assert float(loss.grad) == 0.25
