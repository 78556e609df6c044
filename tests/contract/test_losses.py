"""The contract of what methods add to the loss: every trainer learns from it, once, or is told that it does not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from contract.cases import IDS, TASKS, gates, layers, logits, stir
from multiflora import auxiliary_loss, task
from multiflora.context import find

WEIGHTS = ("router_balance_loss", "balance_weight", "align_weight", "router_z_loss")


def weights(case):
    """The weights of all that the method adds, turned on; none for most."""
    loss = case.method.loss if case.kind != "comol" else None  # whose one head has nothing to be compared with
    on = {} if loss is None else {name: 0.3 for name in loss.weights if name != "router_balance_loss"}
    return on | ({"router_balance_loss": 0.3} if case.name == "mixlora" else {})


def still(case):
    """Settings without any dropout."""
    return {"lora_dropout": 0.0} | ({"head_dropout": 0.0} if hasattr(case.method.config, "head_dropout") else {})


def model_of(case, tiny_llama, **more):
    """An adapter away from its start, in training, without dropout."""
    return stir(case.adapt(tiny_llama(), **still(case), **more)).train()


def of_logits(found):
    """The cross-entropy of a pass's logits."""
    return F.cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradient(model, value):
    """Of the adapter's weights, in one vector."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(wanted, found, strict=True)])


def test_the_model_s_own_loss_has_all_of_it(case, tiny_llama):
    """The loss that the model returns in training has what the method adds, as a mean over layers, once."""
    model = model_of(case, tiny_llama, **weights(case))
    found = model(input_ids=IDS, labels=IDS, task_id=TASKS)
    parts = find(model).losses
    assert len(parts) == (gates(model) if weights(case) else 0)
    added = sum(parts) / gates(model) if parts else torch.tensor(0.0)
    assert float(found.loss) == pytest.approx(float(of_logits(found) + added), rel=1e-5)
    assert auxiliary_loss(model) == 0.0, "it is in the model's loss already"
    by_loss = gradient(model, found.loss)
    found = model(input_ids=IDS, labels=IDS, task_id=TASKS)
    assert torch.allclose(gradient(model, found.loss + auxiliary_loss(model)), by_loss, rtol=1e-4, atol=1e-6)
    # a loop that takes its loss from the logits asks for it
    found = model(input_ids=IDS, task_id=TASKS)
    asked = auxiliary_loss(model)
    assert float(asked) == pytest.approx(float(added), rel=1e-5)
    assert torch.allclose(gradient(model, of_logits(found) + asked), by_loss, rtol=1e-4, atol=1e-6)
    as_tuple = model(input_ids=IDS, labels=IDS, task_id=TASKS, return_dict=False)
    assert float(as_tuple[0]) == pytest.approx(float(of_logits(found) + added), rel=1e-5)
    with torch.no_grad():
        assert float(model.eval()(input_ids=IDS, labels=IDS, task_id=TASKS).loss) == pytest.approx(
            float(of_logits(found)), rel=1e-5
        )


def test_weights_hold_from_the_moment_they_are_set(case, tiny_llama):
    """A weight that is raised or taken away after the first forward pass holds from the next."""
    on = weights(case)
    model = model_of(case, tiny_llama, **dict.fromkeys(on, 0.0))
    config = model.peft_config["default"]
    plain = float(model(input_ids=IDS, labels=IDS, task_id=TASKS).loss)
    for name, value in on.items():
        setattr(config, name, value)
    assert (float(model(input_ids=IDS, labels=IDS, task_id=TASKS).loss) > plain) == bool(on)
    for name in on:
        setattr(config, name, 0.0)
    assert float(model(input_ids=IDS, labels=IDS, task_id=TASKS).loss) == pytest.approx(plain, rel=1e-6)


def test_a_larger_model_has_no_larger_share(case, tiny_llama):
    """What is added does not grow with the number of layers."""
    on = weights(case)
    if not on:
        pytest.skip("it adds nothing to the loss")
    for depth in (1, 4):
        model = model_of(case, lambda depth=depth: tiny_llama(num_hidden_layers=depth), **on)
        model(input_ids=IDS, task_id=TASKS)
        parts = find(model).losses
        assert len(parts) == gates(model)
        assert float(auxiliary_loss(model)) == pytest.approx(float(sum(parts)) / len(parts), rel=1e-5)


class Rows(Dataset):
    """Four rows with their tasks."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"input_ids": IDS[i % 2], "labels": IDS[i % 2], "task_id": TASKS[i % 2]}


class InOrder(Trainer):
    """Rows as they come."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def trained(case, tiny_llama, folder, on, accumulation=1, kind=InOrder):
    """The weights after two steps of transformers' Trainer."""
    model = model_of(case, tiny_llama, **on)
    arguments = TrainingArguments(
        str(folder), max_steps=2, learning_rate=0.01, report_to=[], remove_unused_columns=False, use_cpu=True,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation, save_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant", optim="sgd", seed=0, max_grad_norm=0.0,
    )  # fmt: skip
    kind(model, arguments, train_dataset=Rows()).train()
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


def test_other_trainers_learn_from_it(case, tiny_llama, tmp_path):
    """transformers' Trainer as it is learns from what the method adds, with gradient accumulation as without."""
    on = weights(case)
    none = trained(case, tiny_llama, tmp_path, dict.fromkeys(on, 0.0))
    with_it = trained(case, tiny_llama, tmp_path, on)
    assert torch.equal(none, with_it) != bool(on)
    if case.name in ("mixlora", "hydralora", "rlora"):  # others' losses are no means over tokens
        assert torch.allclose(trained(case, tiny_llama, tmp_path, on, accumulation=2), with_it, atol=1e-5)


class FromLogits(Trainer):
    """A trainer that takes its loss from the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """No labels go into the model."""
        labels = inputs.pop("labels")
        found = model(**inputs)
        return F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class InSpiteOfLabels(Trainer):
    """A trainer that gives labels and takes its loss from the logits all the same."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss is not looked at."""
        found = model(**inputs)
        return F.cross_entropy(found.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


class AndAskedInSpite(InSpiteOfLabels):
    """The same with the line that the warning asks for."""

    def compute_loss(self, model, inputs, *args, **words):
        """What the warning says."""
        return super().compute_loss(model, inputs, *args, **words) + auxiliary_loss(model)


class AndAsked(FromLogits):
    """The same with the line that the warning asks for."""

    def compute_loss(self, model, inputs, *args, **words):
        """What the warning says."""
        return super().compute_loss(model, inputs, *args, **words) + auxiliary_loss(model)


def test_a_trainer_that_passes_it_by_is_told_once(case, tiny_llama, tmp_path):
    """A trainer that takes its loss from the logits is told, once, the line that adds it."""
    on = weights(case)
    told = 1 if on else 0
    weights_of = {}
    for kind, expected in ((FromLogits, told), (InSpiteOfLabels, told), (AndAsked, 0), (AndAskedInSpite, 0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            weights_of[kind] = trained(case, tiny_llama, tmp_path, on, kind=kind)
            trained(case, tiny_llama, tmp_path, dict.fromkeys(on, 0.0), kind=kind)
        lines = [str(one.message) for one in said if "auxiliary_loss" in str(one.message)]
        assert len(lines) == expected
        assert all("loss = loss + multiflora.auxiliary_loss(model)" in line for line in lines)
    assert torch.allclose(weights_of[AndAsked], weights_of[AndAskedInSpite], atol=1e-6)
    assert torch.equal(weights_of[AndAsked], weights_of[FromLogits]) != bool(on)


def test_gradient_checkpointing_keeps_it(case, tiny_llama):
    """Under gradient checkpointing of either kind the loss and its gradients are the same, asked for or not."""
    model = model_of(case, tiny_llama, **weights(case))
    plain = gradient(model, model(input_ids=IDS, labels=IDS, task_id=TASKS).loss)
    model.prepare_model_for_gradient_checkpointing(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for asked in (False, True):
            model.zero_grad()
            found = model(input_ids=IDS, task_id=TASKS, **({} if asked else {"labels": IDS}))
            value = of_logits(found) + auxiliary_loss(model) if asked else found.loss
            value.backward()
            grads = [
                w.grad if w.grad is not None else torch.zeros_like(w) for w in model.parameters() if w.requires_grad
            ]
            assert torch.allclose(torch.cat([grad.flatten() for grad in grads]), plain, rtol=1e-4, atol=1e-6)
            assert len(find(model).losses) == (gates(model) if weights(case) else 0), (
                "a block computed again adds nothing"
            )


def test_adapters_out_of_use_add_nothing(case, tiny_llama):
    """An adapter that is not in use, or not trained, adds nothing to the loss."""
    on = weights(case)
    model = case.adapt(tiny_llama(), **still(case), **dict.fromkeys(on, 0.0))
    model.add_adapter("two", case.config(**still(case), **on))
    model.train()(input_ids=IDS, labels=IDS, task_id=TASKS)
    assert not find(model).losses
    model.set_adapter("two")
    model(input_ids=IDS, labels=IDS, task_id=TASKS)
    assert bool(find(model).losses) == bool(on)
    for layer in layers(model):
        layer.requires_grad_(False)
    model(input_ids=IDS, labels=IDS, task_id=TASKS)
    assert not find(model).losses


def test_padding_is_not_counted(case, tiny_llama):
    """Padding changes nothing of what the method adds, be it told by attention_mask or by real_tokens."""
    on = weights(case)
    if not on:
        pytest.skip("it adds nothing to the loss")
    model = model_of(case, tiny_llama, **on)
    model(input_ids=IDS, task_id=TASKS)
    wanted = float(auxiliary_loss(model))
    padded, mask = F.pad(IDS, (0, 5), value=3), F.pad(torch.ones_like(IDS), (0, 5))
    for words in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(mask), "real_tokens": mask}):
        model(input_ids=padded, task_id=TASKS, **words)
        assert float(auxiliary_loss(model)) == pytest.approx(wanted, rel=1e-4)
    # a row that only fills the batch
    ids, tasks = torch.cat((IDS, IDS[:1] + 1)), torch.cat((TASKS, TASKS[:1]))
    model(input_ids=ids, task_id=tasks, real_tokens=torch.tensor([[1], [1], [0]]).expand(3, 7))
    assert float(auxiliary_loss(model)) == pytest.approx(wanted, rel=1e-4)


def test_the_backbone_keeps_no_old_passes(case, tiny_llama):
    """The backbone called by itself reports its own pass's losses, and no earlier one's."""
    on = weights(case)
    model = model_of(case, tiny_llama, **on)
    model(input_ids=IDS, labels=IDS, task_id=TASKS)
    backbone = model.get_base_model().model
    for _ in range(3):
        with task(model, ["prose", "verse"]):
            backbone(input_ids=IDS)
        assert len(find(model).losses) == (gates(model) if on else 0)


def test_losses_leave_answers_alone(case, tiny_llama):
    """What is added changes no answer: with its weight at 0 and at 1 the logits are the same."""
    on = weights(case)
    a = logits(model_of(case, tiny_llama, **on))
    b = logits(model_of(case, tiny_llama, **dict.fromkeys(on, 0.0)))
    assert torch.equal(a, b)
