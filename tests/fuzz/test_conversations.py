"""Conversations in every form that files have, odd ones, and odd tokenizers: words, or ids that the model has."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, PreTrainedTokenizerFast

from multiflora.base_model import load_tokenizer
from multiflora.data.prepare import encode_tasks
from multiflora.recipe import ModelSpec, recipe_from

from .conftest import World, fuzz
from .junk import changed, odd, spoiled, templates
from .test_data_files import as_lines

EACH = {"conversations": 400, "tokenizers": 150, "chat templates": 100, "tokenizer files": 100}

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"up": 1}'}}
U, A = {"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, U, A, U, {**A, "weight": 0}, U, A]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Is it"}]}, {**A, "reasoning_content": "Hm."}]},
    {
        "messages": [U, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     {"role": "tool", "content": "red", "tool_call_id": "1"}, A],
        "tools": [TOOL],
    },
    {"conversations": [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}]},
    {"prompt": [U], "completion": [A]},
    {"prompt": [{**U, "name": "Ada"}], "completion": [{**A, "content": [{"type": "text", "text": "Y"}]}]},
]  # fmt: skip
CHATML = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
GOOD: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": None,
    "frame": "<s> $A",
    "chat_template": CHATML,
    "rows": 300,
    "positions": 128,
}


@cache
def core() -> str:
    """A byte-level tokenizer without a merge, as JSON."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    return str(made.to_str())


def tokenizer(given: dict[str, Any]) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(core())
    inner.post_processor = processors.TemplateProcessing(
        single=given["frame"], special_tokens=[(word, inner.token_to_id(word)) for word in ("<s>", "</s>")]
    )
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    words = {name: given[name] for name in names if given[name] is not None}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=given["chat_template"], **words)


@st.composite
def tokenizers(draw: Any) -> dict[str, Any]:
    """What comes first and last, what pads, which template: some do not go together, some have ids beyond the model."""
    word = st.sampled_from([None, "<s>", "</s>", "<pad>", "<beyond>", " ", "é"])
    return {
        "bos_token": draw(word),
        "eos_token": draw(word),
        "pad_token": draw(word),
        "unk_token": draw(word),
        "frame": draw(st.sampled_from(["$A", "<s> $A", "$A </s>", "<s> $A </s>"])),
        "chat_template": draw(st.one_of(st.none(), st.just(CHATML))),
        "rows": draw(st.sampled_from([3, 100, 258, 259, 260, 300])),
        "positions": draw(st.sampled_from([1, 8, 128])),
    }


def read(given: dict[str, Any], chat_template: bool, train_on: str, words: Any = None) -> None:
    task = {"name": "talk", "source": {"train": "fuzzed.jsonl"}, "split_sizes": {}, "train_on": train_on}
    recipe = recipe_from(
        {
            "model": {"name": "none/none", "chat_template": chat_template},
            "method": "lora",
            "tasks": [task],
            "train": {"max_steps": 1},
            "output": "out",
        }
    )
    config = GPT2Config(vocab_size=given["rows"], n_positions=given["positions"])
    words = words or tokenizer(given)
    pad = words.pad_token
    found = encode_tasks(recipe, words, config)
    assert words.pad_token == pad
    for example in found.store:
        assert 0 < len(example["input_ids"]) == len(example["labels"]) <= given["positions"]
        assert max(example["input_ids"]) < given["rows"]
        assert {label for label in example["labels"] if label >= 0} <= set(example["input_ids"])
        assert any(label >= 0 for label in example["labels"][1:])


def test_conversations(world: World) -> None:
    modes: list[Any] = []
    lines = st.one_of(
        changed([[talk, talk] for talk in TALKS]).map(as_lines),
        changed([[talk] for talk in TALKS]).map(lambda rows: (json.dumps(rows) + "\n").encode()),
        st.sampled_from(TALKS).flatmap(lambda talk: spoiled((json.dumps(talk) + "\n").encode())),
        odd.map(lambda value: (json.dumps({"messages": value}) + "\n").encode()),
    )

    def write(example: Any) -> None:
        data, *mode = example
        Path("fuzzed.jsonl").write_bytes(data)
        modes[:] = mode

    fuzz(
        world,
        st.tuples(lines, st.booleans(), st.sampled_from(["last", "all"])),
        EACH["conversations"],
        write,
        lambda: read(GOOD, *modes),
        tries=2.5,
    )


def test_tokenizers(world: World) -> None:
    given: list[Any] = []
    Path("fuzzed.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS[:1] * 2), "utf-8")
    fuzz(
        world,
        st.tuples(tokenizers(), st.booleans(), st.sampled_from(["last", "all"])),
        EACH["tokenizers"],
        lambda example: given.__setitem__(slice(None), example),
        lambda: read(*given),
        tries=2.5,
    )


def test_chat_templates(world: World) -> None:
    """Templates that a model brings along, made of whatever multiplies."""
    Path("fuzzed.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS[:1] * 2), "utf-8")
    given: list[Any] = []
    made = templates.map(lambda text: text.replace("prompt", "messages[0].content"))
    around = st.one_of(
        made, made.map(lambda text: CHATML + text), spoiled(CHATML.encode()).map(lambda b: b.decode("latin-1"))
    )
    fuzz(
        world,
        st.tuples(around, st.sampled_from(["last", "all"])),
        EACH["chat templates"],
        lambda example: given.__setitem__(slice(None), example),
        lambda: read({**GOOD, "chat_template": given[0]}, True, given[1]),
        tries=1.5,
    )


def test_tokenizer_files(world: World) -> None:
    """A folder of a tokenizer, changed or spoiled."""
    Path("fuzzed.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS[:1] * 2), "utf-8")
    good = world.root / "good"
    tokenizer(GOOD).save_pretrained(good)
    (good / "config.json").write_text(GPT2Config().to_json_string(), "utf-8")
    names = [path.name for path in sorted(good.iterdir()) if path.suffix in (".json", ".jinja")]
    assert "tokenizer.json" in names

    def one(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        held = (good / name).read_bytes()
        made = [spoiled(held)]
        if name.endswith(".json"):
            made.append(changed([json.loads(held)]).map(lambda value: json.dumps(value).encode()))
        return st.tuples(st.just(name), st.one_of(made))

    def write(example: tuple[str, bytes]) -> None:
        folder = world.work / "fuzzed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / example[0]).write_bytes(example[1])

    fuzz(
        world,
        st.sampled_from(names).flatmap(one),
        EACH["tokenizer files"],
        write,
        lambda: read(GOOD, True, "all", load_tokenizer(ModelSpec(name="./fuzzed"))),
        tries=3,
    )


def test_what_is_not_odd_is_taken(world: World) -> None:
    for talk in TALKS:
        Path("fuzzed.jsonl").write_bytes(as_lines([talk]))
        read(GOOD, False, "all")
    Path("fuzzed.jsonl").write_bytes(as_lines(TALKS[:1]))  # the template above writes neither tools nor reasoning
    read(GOOD, True, "all")
