"""A tampered adapter is refused by the name of the file and the tensor, before anything is built from it."""

from __future__ import annotations

import json

import pytest
import torch
from made_adapters import OURS, adapted, save
from safetensors.torch import load_file, save_file

from multiflora.adapter_folder import check_adapter, load_adapter
from multiflora.errors import AdapterError, ExportError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
KINDS = ["lora", *OURS]
SETTINGS = {"moelora": {"num_experts": 2}}


@pytest.fixture
def make(tiny_llama, tmp_path):
    def saved(kind, folder="ours", **settings):
        return save(adapted(kind, tiny_llama(**SMALL), r=2, **SETTINGS.get(kind, {}), **settings), tmp_path / folder)

    return saved


def tensor(kind, part):
    """The full name of a tensor of an adapter of that kind."""
    last = f"lora_{part}.weight" if kind == "lora" else f"mf_{kind}_{part}"
    return f"base_model.model.model.layers.0.mlp.up_proj.{last}"


def change(folder, **tensors):
    """Write the weights anew, some of them changed; None takes one out."""
    held = load_file(folder / WEIGHTS) | {key: value for key, value in tensors.items() if value is not None}
    save_file({key: value for key, value in held.items() if tensors.get(key, value) is not None}, folder / WEIGHTS)


def reset(folder, **settings):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_every_method_passes(kind, make, tiny_llama):
    folder = make(kind)
    assert check_adapter(folder).r == 2
    model = load_adapter(tiny_llama(**SMALL), folder)
    want = adapted(kind, tiny_llama(**SMALL), r=2, **SETTINGS.get(kind, {}))
    ids, words = torch.arange(6)[None], {} if kind == "lora" else {"task_id": torch.tensor([1])}
    assert torch.equal(model(ids, **words).logits, want(ids, **words).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_wrong_is_named(kind, make):
    folder = make(kind)
    whole = (folder / WEIGHTS).read_bytes()
    name = tensor(kind, "B")
    B = load_file(folder / WEIGHTS)[name]
    broken = B.clone()
    broken[0, 0] = float("nan")
    for wrong, message in (
        ({name: None}, f"tensor {name} is missing"),
        ({name: B[:, :-1].contiguous()}, f"tensor {name} has shape"),
        ({name: B[:0]}, f"tensor {name} is empty"),
        ({name: B.to(torch.int64)}, f"tensor {name} is of type I64"),
        ({name: broken}, f"tensor {name} holds NaN or infinity"),
    ):
        (folder / WEIGHTS).write_bytes(whole)
        change(folder, **wrong)
        with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors: {message}"):
            check_adapter(folder)


def test_a_file_that_is_cut_off_or_lies_is_refused(make):
    folder = make("rlora")
    whole = (folder / WEIGHTS).read_bytes()
    for lie in (whole[:-10], whole[:100], whole[:4], b"", b"\xff" * 8 + whole[8:], whole.replace(b"F32", b"F64", 1)):
        (folder / WEIGHTS).write_bytes(lie)
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read .* cut off or damaged"):
            check_adapter(folder)


def test_another_methods_file_is_refused(make):
    ours, theirs = make("rlora"), make("hydralora", "theirs")
    (ours / WEIGHTS).write_bytes((theirs / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match=r"tensor .*mf_hydralora_A belongs to another method; .* says rlora"):
        check_adapter(ours)
    lora = make("lora", "lora")
    (lora / WEIGHTS).write_bytes((theirs / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match=r"mf_hydralora_A belongs to another method; .* says LORA"):
        check_adapter(lora)


def test_a_tensor_too_many_is_refused(make, tiny_llama):
    folder = make("mlora")
    change(folder, **{tensor("mlora", "router"): torch.ones(2, 2)})
    with pytest.raises(AdapterError, match=r"mf_mlora_router is not one of mlora's \(A, A0, B, B0\)"):
        check_adapter(folder)
    folder = make("mlora", "more")
    change(folder, **{"base_model.model.model.extra": torch.ones(2)})
    with pytest.raises(AdapterError, match=r"holds base_model\.model\.model\.extra, for which .* has no place"):
        load_adapter(tiny_llama(**SMALL), folder)


def test_a_layer_that_was_left_out_is_missed(make, tiny_llama):
    folder = make("hydralora")
    lost = {tensor("hydralora", part): None for part in ("A", "B", "router")}
    change(folder, **lost)
    check_adapter(folder)  # from the file alone, nobody can tell
    with pytest.raises(AdapterError, match=r"up_proj\.mf_hydralora_A.* is missing \(3 of 21 are\)"):
        load_adapter(tiny_llama(**SMALL), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 10**6}, r"says r = 1,000,000, but no tensor is that large"),
        ({"rank_pattern": {"up_proj": 10**6}}, r"says up_proj = 1,000,000"),
        ({"rank_pattern": {"up_proj": 10**9}}, r"rank_pattern\['up_proj'\] is 1000000000; it must be a whole number"),
        ({"r": 3}, r"tensor .* has shape .* but the config asks for"),
        ({"num_heads": 10**4}, r"tensor .* has shape .* but the config asks for"),
        ({"r": "8"}, r"r is '8'; it must be a whole number"),
        ({"r": 2.5}, r"r is 2\.5; it must be a whole number"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan; it must be a number above 0"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"target_modules": "([a-z_.0-9]+)+!"}, r"target_modules holds .*: it takes more than 2 seconds"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, r"megatron_config is set"),
        ({"layer_replication": [[0, 10**6]]}, r"layer_replication is set"),
        ({"peft_type": "MF_RLOR"}, r"peft_type is 'MF_RLOR', .*did you mean MF_RLORA\?"),
        ({"peft_type": None}, r"peft_type is None"),
        ({"num_heads": 0}, r"adapter_config\.json: num_heads is 0"),
    ],
)
def test_a_config_that_lies_is_refused(settings, message, make):
    folder = make("rlora")
    reset(folder, **settings)
    with pytest.raises(AdapterError, match=message):
        check_adapter(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00", '{"peft_type": "LORA"'])
def test_a_config_that_is_none_is_refused(text, make):
    folder = make("rlora")
    (folder / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json (cannot be read|holds a list)"):
        check_adapter(folder)


def test_another_models_adapter_is_refused_before_anything_is_built(make, tiny_llama):
    for kind in ("rlora", "lora"):
        folder = make(kind, kind)
        with pytest.raises(AdapterError, match=r"_proj.* has shape .* of the base model is 1\d x 1\d"):
            load_adapter(tiny_llama(**SMALL | {"hidden_size": 16}), folder)
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes().replace(b"layers.0", b"layers.7"))
        with pytest.raises(AdapterError, match=r"the base model has no layer model\.layers\.7\..*another model"):
            load_adapter(tiny_llama(**SMALL), folder)


def test_a_pickle_is_not_opened(make):
    folder = make("lora")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ExportError, match=r"adapter_model\.bin, a pickle, which can carry code and is not read"):
        check_adapter(folder, ExportError)


def test_a_folder_without_an_adapter_is_said(tmp_path):
    with pytest.raises(AdapterError, match=r"holds no adapter: adapter_config\.json is missing"):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "does not exist"),
        ("", "is a file, no folder"),
        ([], "there is nothing"),
        (["notes.txt", "b.txt"], r"there is b\.txt, notes\.txt\. Give the folder an adapter was saved to"),
        (["checkpoints"], "is not finished: go on with .*--resume"),
        (["recipe.yaml"], "is not finished: go on with .*--resume"),
        (["recipe.yaml", "config.json"], "trained a whole model, which is used as it is"),
    ],
)
def test_what_is_there_instead_of_an_adapter_is_said(tmp_path, files, words):
    folder = tmp_path / "run"
    if files is not None:
        folder.touch() if files == "" else folder.mkdir()
    for name in files or ():
        (folder / name).touch()
    with pytest.raises(ExportError, match=f"run .*{words}"):
        check_adapter(folder, ExportError)
