"""Evaluation on a real, tiny model: its scores are the harness's, whatever we leave out of the work."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import multiflora
from multiflora.data.encode import encode, encode_text
from multiflora.errors import AdapterError, ConfigError, DataError, EnvironmentProblem
from multiflora.evaluation.harness import score_text, to_harness
from multiflora.evaluation.model import HarnessModel
from multiflora.evaluation.run import evaluate
from multiflora.tasks import load_task

TEXT = "is the sky blue? yes no maybe red green one two three 1 2 3 4 5 6 7 8 9 0 + = answer: #### \n"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>", "<pad>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")


def tiny_model(vocabulary: int, context: int = 256) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.4,  # wide, so that an untrained model still has opinions
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return tiny_model(len(tokenizer))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """One task for each way of scoring."""
    colours = [" blue", " red", " maybe green"]
    asked = [
        {
            "prompt": f"is the sky{' blue' * (i % 7)} {i}? answer:",
            "completion": colours[i % 3],
            "choices": colours,
            "answer": i % 3,
        }
        for i in range(13)
    ]
    sums = [
        {"prompt": f"1 + {i}{' + 0' * (i % 4)} =", "completion": f" {i + 1}", "answer": str(i + 1)} for i in range(9)
    ]
    generated = {"generator": "basic_arithmetic", "sizes": {"train": 5, "validation": 5, "test": 4}}
    return [
        {"name": "sky", "source": {"test": lines(tmp_path / "sky.jsonl", asked)}},
        {"name": "sums", "source": {"test": lines(tmp_path / "sums.jsonl", sums)}, "max_new_tokens": 12},
        {
            "name": "same",
            "source": {"test": lines(tmp_path / "same.jsonl", sums)},
            "score": "exact",
            "stop": ["1", "\n"],
        },
        {"name": "told", "source": {"test": lines(tmp_path / "told.jsonl", sums)}, "score": "rouge", "stop": ["\n"]},
        {"name": "lost", "source": {"test": lines(tmp_path / "lost.jsonl", sums)}, "score": "nll"},
        {"name": "proven", "source": generated},
    ]


def plain_scores(model: Any, tokenizer: Any, folder: Path, names: list[str], batch_size: int = 4) -> dict[str, Any]:
    """Scores of the harness alone, on the files that we wrote for it."""
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    return dict(found["results"])


def test_every_kind_of_score_is_the_harness_own_to_the_last_digit(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    ours = evaluate(model, tokenizer, tasks, batch_size=4, max_new_tokens=8, folder=tmp_path / "run")
    assert {name: s["metric"] for name, s in ours["tasks"].items()} == {
        "sky": "acc",
        "sums": "number_match",
        "same": "exact_match",
        "told": "rougeL",
        "lost": "nll",
        "proven": "verifier",
    }
    assert [s["n"] for s in ours["tasks"].values()] == [13, 9, 9, 9, 9, 4]
    theirs = plain_scores(model, tokenizer, tmp_path / "run" / "harness", list(ours["tasks"]))
    for name, score in ours["tasks"].items():
        expected = theirs[name][f"{score['metric']},none"]
        # logits of fewer positions are another product, and float32 need not add up in the same order
        assert score["score"] == (pytest.approx(expected, rel=1e-6) if name == "lost" else expected)
        assert score["stderr"] == pytest.approx(theirs[name][f"{score['metric']}_stderr,none"], rel=1e-5)
    assert 0 < ours["tasks"]["sky"]["score"] < 1
    kept = [s["score"] for name, s in ours["tasks"].items() if name != "lost"]
    assert ours["macro"] == pytest.approx(sum(kept) / 5)


@pytest.mark.parametrize("method", ["lora", "rlora"])
def test_a_saved_adapter_scores_the_same_in_the_harness_alone(
    method: str, model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    config: peft.PeftConfig = (
        peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if method == "lora"
        else multiflora.RLoraConfig(r=4, num_heads=2, target_modules="all-linear")
    )
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    chosen = [tasks[0], tasks[1]]
    base = evaluate(tiny_model(len(tokenizer)), tokenizer, chosen, batch_size=4, max_new_tokens=8)
    ours = evaluate(adapted, tokenizer, chosen, batch_size=4, max_new_tokens=8, folder=tmp_path / "run")
    assert ours["tasks"]["sky"]["nll"] != base["tasks"]["sky"]["nll"]
    fresh = peft.PeftModel.from_pretrained(tiny_model(len(tokenizer)), str(tmp_path / "adapter"))
    theirs = plain_scores(fresh, tokenizer, tmp_path / "run" / "harness", ["sky", "sums"])
    assert ours["tasks"]["sky"]["score"] == theirs["sky"]["acc,none"]
    assert ours["tasks"]["sky"]["other"]["acc_norm"] == theirs["sky"]["acc_norm,none"]
    assert ours["tasks"]["sums"]["score"] == theirs["sums"]["number_match,none"]


def asked(texts: list[tuple[Any, ...]], kind: str) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0) for arguments in texts]


PAIRS = [
    ("is the sky", " blue"),
    ("is the sky", " red"),
    ("is the sky blue? answer:", " yes one two three"),
    ("one", " two"),
    ("one two three 1 2 3 4 5 6 7 8 9\n", "maybe"),
    ("", "yes no"),
    ("two", " three three three three three three"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_logits_at_the_end_of_the_batch_are_enough(model: Any, tokenizer: Any, batch_size: int) -> None:
    whole = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    ours = HarnessModel(model, tokenizer, batch_size)
    sizes: list[int] = []
    head = model.get_output_embeddings().register_forward_hook(lambda _m, i, o: sizes.append(i[0].shape[1]))
    expected = whole.loglikelihood(asked(PAIRS, "loglikelihood"), disable_tqdm=True)
    positions_of_all, _ = sum(sizes), sizes.clear()
    found = ours.loglikelihood(asked(PAIRS, "loglikelihood"))
    head.remove()
    assert [a[1] for a in found] == [a[1] for a in expected]
    assert [a[0] for a in found] == pytest.approx([a[0] for a in expected], rel=1e-5)
    # in the batch of all, short inputs beside long ones leave nothing to save
    assert sum(sizes) < positions_of_all or batch_size == 16


def test_a_row_that_met_its_stop_changes_no_text(model: Any, tokenizer: Any) -> None:
    settings = {"until": ["1", " yes"], "max_gen_toks": 24, "do_sample": False}
    requests = [(prompt, dict(settings)) for prompt, _ in PAIRS if prompt]
    whole = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = whole.generate_until(asked(requests, "generate_until"), disable_tqdm=True)
    assert HarnessModel(model, tokenizer, 4).generate_until(asked(requests, "generate_until")) == expected
    assert len(set(map(len, expected))) > 1  # some met a stop early


def test_scores_do_not_depend_on_the_batch_size(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    one, many = (evaluate(model, tokenizer, tasks, batch_size=size, max_new_tokens=8) for size in (1, 16))
    for name in one["tasks"]:
        assert one["tasks"][name]["score"] == pytest.approx(many["tasks"][name]["score"], rel=1e-5)
    assert one["tasks"]["sky"]["nll"] == pytest.approx(many["tasks"]["sky"]["nll"], rel=1e-5)


def test_evaluating_twice_gives_the_same_and_leaves_no_trace(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model.train()
    before = torch.random.get_rng_state()
    first = evaluate(model, tokenizer, tasks, max_new_tokens=8)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    said = capsys.readouterr()
    assert said.out == ""
    assert "it/s" not in said.err  # the harness's bars
    assert json.dumps(evaluate(model, tokenizer, tasks, max_new_tokens=8)) == json.dumps(first)


def test_nats_of_choices_are_normalised_over_the_choices(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = evaluate(model, tokenizer, tasks[:1])["tasks"]["sky"]
    surprises = []
    for line in (tmp_path / "sky.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, likelihoods = tokenizer(row["prompt"]).input_ids, []
        for choice in row["choices"]:
            ids = tokenizer(choice).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            likelihoods.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        surprises.append(-torch.stack(likelihoods).log_softmax(0)[row["answer"]].item())
    assert found["nll"] == pytest.approx(sum(surprises) / len(surprises), rel=1e-4)


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_nats_per_token_are_those_of_the_training_loss(model: Any, tokenizer: Any, tmp_path: Path, end: str) -> None:
    rows = [{"prompt": f"is the sky blue {i}?{end}", "completion": f" no {'maybe ' * i}1"} for i in range(4)]
    rows.append({"prompt": "is the sk", "completion": "y"})  # the boundary lies within a token of the whole text
    task = load_task(
        {"name": "said", "source": {"train": (path := lines(tmp_path / "said.jsonl", rows)), "test": path}}
    )
    whole = Dataset.from_list(rows)
    losses = []
    for row in encode(whole, tokenizer, task="said", task_id=0, max_length=200).dataset:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:])).item())
        assert row["labels"][-1] == tokenizer.eos_token_id
    found = evaluate(model, tokenizer, [task], folder=tmp_path / "run")["tasks"]["said"]
    assert found["nll"] == found["score"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_length_normalised_choices_are_scored_by_bytes(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    found = evaluate(model, tokenizer, [{**tasks[0], "length_normalised": True}])["tasks"]["sky"]
    assert found["metric"] == "acc_bytes"
    assert set(found["other"]) == {"acc", "acc_norm"}


def test_an_adapter_that_routes_by_task_is_told_the_task(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = multiflora.MoeLoraConfig(r=4, num_experts=2, num_tasks=2, task_names=["sky", "sums"])
    config.target_modules = ["q_proj", "v_proj"]
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    sky = tasks[0]
    as_itself = evaluate(adapted, tokenizer, [sky])["tasks"]["sky"]["nll"]
    with multiflora.task(adapted, "sums"):
        # the task that is scored comes before the caller's
        assert evaluate(adapted, tokenizer, [sky])["tasks"]["sky"]["nll"] == as_itself
        under_another_name = evaluate(adapted, tokenizer, [{**sky, "name": "heaven"}])["tasks"]["heaven"]["nll"]
    assert under_another_name != as_itself
    with pytest.raises(AdapterError, match="sky, sums"):
        evaluate(adapted, tokenizer, [{**sky, "name": "heaven"}])


def test_extra_tasks_are_scored_but_not_averaged(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    found = evaluate(model, tokenizer, tasks[:1], extra_tasks=[multiflora.tasks.load_task(tasks[1])], max_new_tokens=8)
    assert [s["group"] for s in found["tasks"].values()] == ["tasks", "extra"]
    assert found["macro"] == found["tasks"]["sky"]["score"]


def test_a_limit_scores_a_part(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    assert evaluate(model, tokenizer, tasks[:1], limit=5)["tasks"]["sky"]["n"] == 5
    one = evaluate(model, tokenizer, tasks[:1], limit=1)["tasks"]["sky"]
    assert one["stderr"] is None  # one example has no spread


def test_the_folder_can_be_moved_and_names_no_place(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    first = evaluate(model, tokenizer, tasks, max_new_tokens=8, batch_size=4, folder=tmp_path / "run")
    moved = (tmp_path / "run" / "harness").rename(tmp_path / "moved")
    for name in ("sky", "lost", "proven"):
        (tmp_path / f"{name}.jsonl").unlink(missing_ok=True)
    written = [p for p in moved.iterdir() if p.is_file()]
    assert written
    assert not [p.name for p in written if str(tmp_path) in p.read_text()]
    theirs = plain_scores(model, tokenizer, moved, ["sky", "proven"])
    assert theirs["sky"]["acc,none"] == first["tasks"]["sky"]["score"]


def test_the_chat_template_is_in_what_the_model_reads(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    try:
        evaluate(model, tokenizer, tasks[:2], chat_template=True, max_new_tokens=8, folder=tmp_path / "run")
    finally:
        tokenizer.chat_template = None
    row = json.loads((tmp_path / "run" / "harness" / "sky.jsonl").read_text().splitlines()[1])
    assert row["prompt"] == "<user>is the sky blue 1? answer:</s><assistant>"
    assert row["choices"] == ["blue", "red", "maybe green"]
    assert row["completion"] == "red"


def test_what_is_longer_than_the_context_is_left_out_and_counted(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "one two " * n, "completion": " three"} for n in (2, 40)]
    choices = [{**row, "choices": [" three", " two" * 40], "answer": 0} for row in rows]
    small = tiny_model(len(tokenizer), context=32)
    tasks = [{"name": "long", "source": {"test": lines(tmp_path / "long.jsonl", rows)}}]
    with caplog.at_level(logging.WARNING, logger="multiflora"):
        found = evaluate(small, tokenizer, tasks)["tasks"]["long"]
    assert (found["n"], found["left_out"]) == (1, 1)
    assert "long: 1 of 2 test examples are longer than the model's context of 32 tokens" in caplog.text
    tasks = [{"name": "none", "source": {"test": lines(tmp_path / "none.jsonl", choices)}}]
    with pytest.raises(DataError, match=r"task none: none of its 2 test examples fits .* context of 32 tokens"):
        evaluate(small, tokenizer, tasks)


def test_ids_without_an_embedding_are_refused_before_the_work(tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"the tokenizer makes the id \d+, but the model has embeddings for 60 only"):
        evaluate(tiny_model(60), tokenizer, tasks[:1])


@pytest.mark.parametrize("pad", [None, "<pad>"])
def test_the_tokenizer_of_the_caller_stays_as_it_is(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], pad: str | None
) -> None:
    tokenizer.pad_token = pad
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer), tokenizer.backend_tokenizer.to_str())
    try:
        evaluate(model, tokenizer, tasks[2:3], max_new_tokens=2)
        after = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer), tokenizer.backend_tokenizer.to_str())
    finally:
        tokenizer.pad_token = "<pad>"
    assert after == before


def test_an_answer_behind_a_think_block_counts(tokenizer: Any, tmp_path: Path) -> None:
    around = ("<think>\n\n</think>\n\n", "[end]\n")
    doc = {"id": "t-0", "prompt": "p", "completion": f"{around[0]}7{around[1]}", "around": list(around)}
    spec = load_task({"name": "t", "source": {"path": "o/d"}, "prompt": "p", "completion": " 7", "score": "exact"})
    for text in (doc["completion"], "<think>\n3 + 4\n</think>\n\n7[end]\n8", "7"):
        assert score_text(spec, doc, text) == {"exact_match": 1.0}
    row = {"task": "t", "tokens": 1, **doc}
    to_harness(spec, [row], tmp_path, max_new_tokens=8)
    assert "until:\n  - '[end]'\n" in (tmp_path / "t.yaml").read_text()


def test_an_answer_longer_than_the_context_is_refused(tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens\) is 256, but the model reads 32 tokens"):
        evaluate(tiny_model(len(tokenizer), context=32), tokenizer, tasks[2:3])


def test_a_completion_that_begins_within_a_token_is_scored_as_it_was_trained(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "is the sk", "completion": "y"}]
    task = {"name": "melted", "source": {"test": lines(tmp_path / "melted.jsonl", rows)}}
    first, rest = encode_text("is the sk", "y", tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([first + rest[:-1]])).logits[0].log_softmax(-1)
    # the end of text counts, as it does in training
    wanted = -sum(logits[len(first) - 1 + k, token].item() for k, token in enumerate(rest)) / len(rest)
    assert len(rest) == 2
    assert evaluate(model, tokenizer, [task])["tasks"]["melted"]["score"] == pytest.approx(wanted, rel=1e-4)


def test_what_is_missing_is_said(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="no tasks to score"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ConfigError, match="no tokenizer"):
        evaluate(model, tasks=tasks)
    with pytest.raises(ConfigError, match="split is 'train'; expected test or validation"):
        evaluate(model, tokenizer, tasks, split="train")


@pytest.fixture
def harness_index(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The harness, with tasks of its own that need no network; indexing the thousands it ships takes long."""
    folder = tmp_path / "theirs" / "harness"
    evaluate(model, tokenizer, tasks[:2], max_new_tokens=8, folder=folder.parent)
    sky = (folder / "sky.yaml").read_text()
    (folder / "night.yaml").write_text(sky.replace("task: sky", "task: night\ntag: skies"))
    (folder / "far.yaml").write_text(sky.replace("task: sky", "task: far\ndataset_path: no/where").split("custom_")[0])
    group = "group: both\ntask: [sky, night]\naggregate_metric_list: [{metric: acc, aggregation: mean}]\n"
    (folder / "both.yaml").write_text(group)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("multiflora.evaluation.run._their_manager", lambda: manager)
    return folder


@pytest.mark.usefixtures("harness_index")
def test_tasks_of_the_harness_are_scored_beside_ours(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    found = evaluate(model, tokenizer, tasks[:1], harness_tasks=["sky", "both", "skies"])
    assert list(found["tasks"]) == ["sky", "harness/sky", "harness/both", "harness/night"]
    ours, same, both, night = found["tasks"].values()
    assert same["group"] == "harness"
    assert same["score"] == both["score"] == night["score"] == ours["score"]
    assert [same["n"], both["n"]] == [13, 26]
    assert found["macro"] == ours["score"]
    limited = evaluate(model, tokenizer, harness_tasks=["sky"], limit=4)
    assert limited["tasks"]["harness/sky"]["n"] == 4
    assert limited["macro"] is None


@pytest.mark.usefixtures("harness_index")
def test_a_limit_draws_rows_of_the_harness_s_tasks_and_writes_their_scores(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    drawn = {}
    for limit in (4, 8, None):
        found = evaluate(model, tokenizer, harness_tasks=["sky", "both"], limit=limit, folder=tmp_path / str(limit))
        for name in ("sky", "both"):
            text = (tmp_path / str(limit) / "scores" / "harness" / f"{name}.jsonl").read_text()
            drawn[name, limit] = {row["id"]: row["score"] for row in map(json.loads, text.splitlines())}
            score = found["tasks"][f"harness/{name}"]
            assert len(drawn[name, limit]) == score["n"]
            assert np.mean(list(drawn[name, limit].values())) == pytest.approx(score["score"])
        assert found["tasks"]["harness/both"]["n"] == 2 * (limit or 13)
    assert set(drawn["sky", 4]) != {f"sky-{i}" for i in range(4)}
    assert drawn["sky", 4].items() <= drawn["sky", 8].items() <= drawn["sky", None].items()


@pytest.mark.usefixtures("harness_index")
def test_tasks_of_the_harness_get_the_chat_template_too(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    score = HarnessModel.loglikelihood
    monkeypatch.setattr(
        HarnessModel, "loglikelihood", lambda lm, asked: (read.extend(r.args[0] for r in asked), score(lm, asked))[1]
    )
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluate(model, tokenizer, harness_tasks=["sky"], chat_template=True)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    monkeypatch.setattr(
        tokenizer, "chat_template", turns + "{% if add_generation_prompt %}<assistant>{% endif %}", raising=False
    )
    evaluate(model, tokenizer, harness_tasks=["sky"], chat_template=True)
    assert "<user>is the sky 0? answer:</s><assistant>" in read
    read.clear()
    evaluate(model, tokenizer, harness_tasks=["sky"])
    assert "is the sky 0? answer:" in read
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'a' * 10**(8 + messages | length) }}", raising=False)
    with pytest.raises(DataError, match=r"refuses .* MiB of memory"):
        evaluate(model, tokenizer, harness_tasks=["sky"], chat_template=True)


def test_an_answer_that_starts_with_a_line_end_is_read_and_not_cut(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ? answer:", "completion": " 7", "answer": "7"} for i in range(3)]
    source = {"test": lines(tmp_path / "late.jsonl", rows)}
    tasks = [{"name": name, "source": source, "score": name} for name in ("exact", "number", "rouge")]
    tasks[2]["stop"] = "\n"
    # from the colon a line end, from there 7, and a line end again
    steps = [tokenizer(text).input_ids[-1] for text in (":", "\n", "7", "\n")]
    model = writes(steps, len(tokenizer))
    found = evaluate(model, tokenizer, tasks, max_new_tokens=6, folder=tmp_path / "run")["tasks"]
    assert {name: score["score"] for name, score in found.items()} == {"exact": 1.0, "number": 1.0, "rouge": 1.0}
    alone = plain_scores(model, tokenizer, tmp_path / "run" / "harness", ["exact"])
    assert alone["exact"]["exact_match,none"] == 1.0


def writes(steps: list[int], vocabulary: int) -> Any:
    """A model in which each token is followed by the next of ``steps``, whatever stands before it."""
    model = tiny_model(vocabulary)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for now, following in pairwise(steps):
            model.lm_head.weight[following] += model.model.embed_tokens.weight[now]
    return model


@pytest.mark.usefixtures("harness_index")
def test_a_task_of_the_harness_is_looked_up_before_anything_is_scored(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match=r"'nigth', which lm-evaluation-harness does not have; did you mean night\?"):
        evaluate(model, tokenizer, tasks, harness_tasks=["nigth"])
    with pytest.raises(EnvironmentProblem, match=r"cannot load its task 'far'.*check the network"):
        evaluate(model, tokenizer, tasks, harness_tasks=["far"])


def test_the_package_is_the_public_function(model: Any, tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    found = multiflora.evaluate(model, tokenizer, tasks[:1], limit=2)
    assert found["tasks"]["sky"]["n"] == 2


def test_each_examples_score_is_written_and_their_mean_is_the_task_s(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    results = evaluate(model, tokenizer, tasks, batch_size=4, max_new_tokens=8, folder=tmp_path / "out", progress=False)
    for name, score in results["tasks"].items():
        rows = [json.loads(line) for line in (tmp_path / "out" / "scores" / f"{name}.jsonl").read_text().splitlines()]
        assert len({row["id"] for row in rows}) == score["n"]
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(score["score"])
        if score["nll"] is None:
            assert {row["nll"] for row in rows} == {None}
        else:
            assert sum(row["nll"] for row in rows) / len(rows) == pytest.approx(score["nll"])
