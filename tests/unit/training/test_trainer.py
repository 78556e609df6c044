"""MultitaskTrainer: the loss is the plain one, whatever the batches look like, and the log tells tasks apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import multiflora
from multiflora.context import find
from multiflora.data.collate import Collator
from multiflora.data.weights import task_weights
from multiflora.errors import ConfigError
from multiflora.methods import build_config
from multiflora.training.trainer import MultitaskTrainer

VOCABULARY = 40


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_model(adapter: Any = None) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )
    model = get_peft_model(base, adapter or LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():  # away from the start, so that every adapter weight has a gradient
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), eos_token="w1", pad_token="w0"
    )


def make_examples(number: int = 12, num_tasks: int = 3) -> Dataset:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(number):
        length = int(torch.randint(3, 12, (), generator=draw))
        ids = torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()
        prompt = int(torch.randint(1, length - 1, (), generator=draw))
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "task_id": i % num_tasks, "length": length})
    return Dataset.from_list(rows)


def make_trainer(
    model: nn.Module, folder: Path, *, packing: bool | None = None, examples: Dataset | None = None, **settings: Any
) -> MultitaskTrainer:
    folded = {} if packing is None else {"packing": packing}
    given = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "weight_decay": 0.0} | settings
    args = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        dataset_kwargs={"skip_prepare_dataset": True},
        **({"gradient_checkpointing": False, "save_strategy": "no"} | given),
    )
    return MultitaskTrainer(
        model=model,
        args=args,
        train_dataset=examples or make_examples(),
        processing_class=make_tokenizer(),
        task_names=("a", "b", "c"),
        max_length=24,
        **folded,
    )


def test_a_batch_has_a_row_for_each_example_and_fewer_only_where_they_are_packed(tmp_path: Path) -> None:
    rows = {}
    for packing in ({}, {"packing": False}, {"packing": True}):
        batch = next(iter(make_trainer(make_model(), tmp_path, **packing).get_train_dataloader()))
        rows[str(packing)] = len(batch["input_ids"])
    assert rows == {"{}": 4, "{'packing': False}": 4, "{'packing': True}": 2}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model: nn.Module, examples: Dataset) -> tuple[Tensor, Tensor]:
    """One example at a time, all logits, no batches: the sum over tokens, and their number."""
    losses: list[Tensor] = []
    for row in examples:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none", ignore_index=-100))
    tokens = sum(int((torch.tensor(row["labels"][1:]) != -100).sum()) for row in examples)
    return torch.cat(losses).sum(), torch.tensor(tokens)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_mean_over_tokens(
    tmp_path: Path, packing: bool, accumulation: int, checkpointing: bool
) -> None:
    trainer = make_trainer(
        make_model(),
        tmp_path,
        packing=packing,
        per_device_train_batch_size=12 // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    batches, tokens = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), accumulation, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = accumulation
    loss = sum(trainer.training_step(trainer.model, batch, tokens) for batch in batches)

    oracle = make_model()
    total, count = plain_loss(oracle, make_examples())
    (total / count).backward()
    assert int(tokens) == int(count)
    torch.testing.assert_close(loss, (total / count).detach(), atol=1e-6, rtol=1e-6)
    expected = gradients(oracle)
    assert gradients(trainer.model).keys() == expected.keys()
    for name, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_with_weights_the_loss_and_gradients_are_those_of_the_tasks_own_means(
    tmp_path: Path, packing: bool, accumulation: int
) -> None:
    examples = make_examples().map(lambda row: {"task_id": int(row["length"] > 9) + int(row["length"] > 4)})
    tokens = np.array([sum(label != -100 for label in row["labels"]) for row in examples])
    tasks = np.array(examples["task_id"][:])
    assert len(set(np.bincount(tasks))) > 1  # the tasks hold different shares, of examples and of tokens
    trainer = make_trainer(
        make_model(),
        tmp_path,
        packing=packing,
        per_device_train_batch_size=12 // accumulation,
        gradient_accumulation_steps=accumulation,
        examples=examples.add_column("loss_weight", task_weights(tasks, tokens, 12)),
    )
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), accumulation, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = accumulation
    loss = sum(trainer.training_step(trainer.model, batch, count) for batch in batches)

    oracle = make_model()
    expected = torch.tensor(0.0)
    for task, share in enumerate(np.bincount(tasks) / 12):
        total, number = plain_loss(oracle, examples.filter(lambda row, task=task: row["task_id"] == task))
        expected = expected + share * total / number
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-6)
    for name, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(gradient, gradients(oracle)[name], atol=1e-6, rtol=1e-5, msg=name)


def test_every_log_line_has_each_tasks_own_mean_loss_and_the_speed(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, learning_rate=0.0, logging_steps=3)
    trainer.train()
    [line] = [line for line in trainer.state.log_history if "loss/a" in line]
    for task, name in enumerate("abc"):
        total, count = plain_loss(make_model(), make_examples().filter(lambda row, task=task: row["task_id"] == task))
        assert line[f"loss/{name}"] == pytest.approx((total / count).item(), rel=1e-5)
    assert line["tokens_per_second"] > 0
    assert line["epoch"] == pytest.approx(1.0)


def test_the_log_window_starts_anew_after_each_line(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, learning_rate=0.0, logging_steps=1)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss/a" in line]
    assert len(lines) == 3
    assert len({line["loss/a"] for line in lines}) == 3


def test_examples_are_trained_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path)
    tasks = torch.cat([batch["task_id"] for batch in trainer.get_train_dataloader()])
    assert tasks.tolist() == make_examples()["task_id"][:]


def test_the_checkpoints_folder_comes_with_the_first_checkpoint_and_not_before(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
    trainer.train()
    assert not (tmp_path / "checkpoints").exists()
    make_trainer(make_model(), tmp_path / "checkpoints", save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "complete.json").exists()


def test_an_output_folder_that_was_there_stays(tmp_path: Path) -> None:
    make_trainer(make_model(), tmp_path).train()
    assert tmp_path.is_dir()


DECAYED = {
    "multilora": {"A", "B"},
    "hydralora": {"A", "B"},
    "moelora": {"A", "B"},
    "mtllora": {"A", "B"},
    "rlora": {"A", "B"},
}


@pytest.mark.parametrize("method", DECAYED)
def test_weight_decay_is_for_a_and_b_wherever_they_stand(method: str, tmp_path: Path) -> None:
    """Also on modules whose own name has a gate in it; not for routers, scales, embeddings and matrices of a task."""
    settings = {"target_modules": ["gate_proj", "q_proj"]} | ({} if method == "multilora" else {"r": 4})
    settings |= {"num_tasks": 3} if method in ("moelora", "mtllora") else {}
    settings |= {"num_experts": 2} if method == "moelora" else {}
    trainer = make_trainer(make_model(build_config(method, settings)), tmp_path, weight_decay=0.1)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    decayed = trained & set(trainer.get_decay_parameter_names(trainer.model))
    parts = {name.split(".mf_")[1].split(".")[0].rpartition(f"{method}_")[2] for name in decayed}
    assert parts == DECAYED[method]
    assert any("gate_proj" in name for name in decayed)
    assert all(name.split(".")[-2].endswith(("_A", "_B")) == (name in decayed) for name in trained)
    trainer.create_optimizer()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("adapter", "spared"),
    [
        (LoraConfig(r=2, target_modules=["gate_proj", "up_proj"]), set()),
        (LoraConfig(r=2, use_dora=True, target_modules=["gate_proj"]), {"lora_magnitude_vector"}),
        (IA3Config(target_modules=["k_proj", "gate_proj"], feedforward_modules=["gate_proj"]), {"ia3_l"}),
    ],
    ids=["lora", "dora", "ia3"],
)
def test_weight_decay_of_peft_s_adapters_spares_scales_alone(adapter: Any, spared: set[str], tmp_path: Path) -> None:
    trainer = make_trainer(make_model(adapter), tmp_path, weight_decay=0.1)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert trained - decayed == {name for name in trained if spared & set(name.split("."))}


def test_a_copy_of_the_trained_model_stands_alone(tmp_path: Path) -> None:
    model = make_model()
    make_trainer(model, tmp_path)
    assert "forward" not in vars(model.get_base_model())


def test_the_adapters_auxiliary_loss_is_added_once_per_step(tmp_path: Path) -> None:
    settings = {"r": 2, "router_z_loss": 0.5, "lora_dropout": 0.0, "target_modules": "all-linear"}
    trainer = make_trainer(make_model(build_config("loramoe", settings)), tmp_path)
    batch = Collator(pad_token_id=0)(list(make_examples().select(range(4))))
    trainer.current_gradient_accumulation_steps = 1
    whole = trainer.compute_loss(trainer.model.train(), batch)
    auxiliary = multiflora.auxiliary_loss(trainer.model)
    trainer.current_gradient_accumulation_steps = 4
    quarter = trainer.compute_loss(trainer.model, batch)
    assert float(auxiliary) > 0.01
    torch.testing.assert_close(whole - quarter, auxiliary * 3 / 4, atol=1e-6, rtol=1e-5)


ROWS = Dataset.from_list(
    [{"input_ids": [3, 4, 5, 6, 7, 8 + i], "labels": [-100, -100, 5, 6, 7, 8 + i]} for i in range(8)]
)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trl_s_own_trainer_learns_from_the_adapters_losses(accumulation: int, tmp_path: Path) -> None:
    def trained(weight: float) -> Tensor:
        settings = {"r": 2, "num_experts": 3, "lora_dropout": 0.0, "target_modules": ["q_proj", "up_proj"]}
        model = make_model(build_config("mixlora", settings | {"router_balance_loss": weight}))
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4 // accumulation, report_to="none",
            gradient_accumulation_steps=accumulation, bf16=False, use_cpu=True, disable_tqdm=True, save_strategy="no",
            optim="sgd", learning_rate=0.1, max_grad_norm=0.0, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        SFTTrainer(model=model, args=args, train_dataset=ROWS, processing_class=make_tokenizer()).train()
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert (trained(100.0) - trained(0.0)).abs().max() > 1e-3


def test_a_mean_over_tokens_takes_them_with_its_own_weight_and_a_preference_does_not() -> None:
    settings = {"r": 2, "num_experts": 3, "lora_dropout": 0.0, "target_modules": ["q_proj"], "router_balance_loss": 9.0}
    model = make_model(build_config("mixlora", settings)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    add_fused_lm_head(model.get_base_model())
    ids, labels = torch.tensor(ROWS["input_ids"]), torch.tensor(ROWS["labels"])

    def gradient(take: Any) -> Tensor:
        outputs = model(input_ids=ids, labels=labels, fused_lm_head=True)
        grads = torch.autograd.grad(take(outputs), trained, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained, grads, strict=True)]
        )

    tokens = int((labels[:, 1:] != -100).sum())
    in_loss = gradient(lambda out: 8 * out.loss)
    torch.testing.assert_close(gradient(lambda out: -8 * out.log_probs.sum() / tokens), in_loss, atol=1e-5, rtol=1e-4)
    both = gradient(lambda out: 8 * (-out.log_probs.sum() / tokens + multiflora.auxiliary_loss(model)))
    torch.testing.assert_close(both, in_loss, atol=1e-5, rtol=1e-4)

    def preference(out: Any) -> Tensor:
        return -F.logsigmoid(out.log_probs[::2].sum() - out.log_probs[1::2].sum())

    alone = gradient(preference)
    assert not any(bool(one) for one in find(model)._here.last.reached)
    asked = gradient(lambda out: preference(out) + multiflora.auxiliary_loss(model))
    torch.testing.assert_close(
        asked - alone, (in_loss - 8 * nll(model, ids, labels, trained)) / 8, atol=1e-5, rtol=1e-3
    )


def nll(model: nn.Module, ids: Tensor, labels: Tensor, trained: list[Tensor]) -> Tensor:
    model.peft_config["default"].router_balance_loss = 0.0
    grads = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, trained, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained, grads, strict=True)])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["mixlora", "alignlora", "loramoe"])
def test_fill_has_no_part_in_the_adapters_losses(method: str, packing: bool, tmp_path: Path) -> None:
    """Neither what pads a row or fills a folded one, nor rows that only fill the last step up."""
    settings = {"lora_dropout": 0.0, "r": 2, "num_tasks": 3, "target_modules": ["q_proj", "up_proj"]}
    settings |= {"router_z_loss": 0.3, "num_experts": 3} if method in ("mixlora", "loramoe") else {"align_weight": 0.3}
    settings |= {"router_balance_loss": 0.0} if method == "mixlora" else {}
    trainer = make_trainer(make_model(build_config(method, settings)), tmp_path, packing=packing)
    examples = make_examples()
    model = trainer.model.train()
    seen: list[Tensor] = []
    for row in examples:  # one at a time there is no fill
        model(
            input_ids=torch.tensor([row["input_ids"]]),
            **(
                {"task_id": torch.tensor([0])} if method != "alignlora" else {"task_id": torch.tensor([row["task_id"]])}
            ),
        )
        seen.append(torch.stack(model_losses(model)))
    rows = [row | {"example": i} for i, row in enumerate(examples)]
    rows += [rows[0] | {"example": -1}, rows[3] | {"example": -1}]
    collate = Collator(pad_token_id=0, packing=packing, max_length=24)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(model, collate(rows))
    found = torch.stack(model_losses(model))
    if method == "alignlora":
        # the rows in fill must not change it: the same batch without them
        trainer.compute_loss(model, collate(rows[:-2]))
        torch.testing.assert_close(found, torch.stack(model_losses(model)), atol=1e-5, rtol=1e-4)
    else:
        lengths = torch.tensor([float(len(row["input_ids"])) for row in examples])
        wanted = (torch.stack(seen) * lengths[:, None]).sum(0) / lengths.sum()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def model_losses(model: nn.Module) -> list[Tensor]:
    return [loss.detach() for loss in find(model).losses]


@pytest.mark.parametrize("packing", [False, True])
def test_adapters_that_route_by_task_are_told_the_task_of_every_row_or_token(tmp_path: Path, packing: bool) -> None:
    settings = {"r": 4, "num_experts": 2, "num_tasks": 3, "target_modules": "all-linear"}
    model = make_model(build_config("moelora", settings))
    examples = make_examples()
    trainer = make_trainer(model, tmp_path, packing=packing)
    batch = Collator(pad_token_id=0, packing=packing, max_length=24)(list(examples))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    total, count = torch.tensor(0.0), 0
    for row in examples:
        with multiflora.task(model, row["task_id"]), torch.no_grad():
            one, tokens = plain_loss(model, Dataset.from_list([row]))
        total, count = total + one, count + int(tokens)
    torch.testing.assert_close(loss.detach(), total / count, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [("rlora", {}), ("parts", {"gate": "stem", "core": "full"}), ("parts", {"gate": "stem", "stem": "blended"})],
)
def test_routers_learn_at_a_rate_of_their_own(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    settings = {"num_heads": 2, "r": 2, "target_modules": ["q_proj", "up_proj"]} | words
    model = make_model(build_config(name, settings))
    trainer = make_trainer(model, tmp_path)
    trainer.router_lr_ratio = 10.0
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    optimizer = trainer.optimizer
    rates = {id(part): group["lr"] for group in optimizer.param_groups for part in group["params"]}
    routers = {name for name, _ in model.named_parameters() if "router" in name}
    assert routers
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    assert len(rates) == len(trained)
    most = max(rates[id(part)] for name, part in trained.items() if name not in routers)
    for one, part in trained.items():
        assert rates[id(part)] == pytest.approx(most * (10.0 if one in routers else 1.0)), one
    trainer.create_optimizer()
    assert max(group["initial_lr"] for group in optimizer.param_groups) == pytest.approx(
        10 * min(group["initial_lr"] for group in optimizer.param_groups)
    )


def test_a_rate_for_routers_that_are_not_there_is_refused(tmp_path: Path) -> None:
    model = make_model(build_config("mlora", {"num_heads": 2, "r": 2, "target_modules": ["q_proj"]}))
    trainer = make_trainer(model, tmp_path)
    trainer.router_lr_ratio = 10.0
    with pytest.raises(ConfigError, match="router_lr_ratio is 10, but this method has no token router"):
        trainer.create_optimizer()
