"""llama.cpp with our adapter writes what transformers writes with the same LoRA: SmolLM2-135M, greedy, float32.

The base model's GGUF is the embedded one with every tensor in float32. From the quantised file llama.cpp would multiply
quantised activations as well, which moves logits by more than one, without any adapter too.
"""

from __future__ import annotations

import ctypes
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from made_adapters import TASKS, adapted, save
from peft import PeftModel

import multiflora
from multiflora.embedded import embedded_model, find_gguf
from multiflora.export.experts import scaled
from multiflora.export.gguf_lora import read_gguf, to_gguf
from multiflora.export.same import with_pairs

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp's binding is not installed: pip install llama-cpp-python"
)
gguf = pytest.importorskip("gguf")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_gguf() is None, reason="the embedded model is not installed: make demo installs it"),
]

QUESTIONS = [
    "Name three fruits.",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Tell me a short story.",
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """The embedded model's GGUF in float32, with the values that `embedded_model` has: rounded to bfloat16."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    reader = gguf.GGUFReader(str(find_gguf()))
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield path
    path.unlink()  # half a gigabyte


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]


def by_transformers(model, tokenizer, prompt):
    """The greedy answer, and the logits of each of its tokens, (T, V)."""
    prompted = tokenizer(prompt, return_tensors="pt")
    words = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        made = model.generate(**prompted, **words)
    answer = made.sequences[0, prompted["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True), torch.cat(made.logits)


@contextmanager
def llama_cpp_with(base, files):
    """llama.cpp with several adapters loaded: a function (prompt, scale of each) -> greedy answer, its tokens' logits.

    It sets the scales as llama-server does for each request, and reads the whole prompt anew.
    """
    f32 = llama_cpp.GGML_TYPE_F32  # of keys and values: half precision would be the default
    llama = llama_cpp.Llama(str(base), n_threads=1, logits_all=True, type_k=f32, type_v=f32, verbose=False)
    loaded = [llama_cpp.llama_adapter_lora_init(llama.model, str(file).encode()) for file in files]
    assert all(loaded)
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(files))(*loaded)

    def answer(prompt, scales):
        numbers = (ctypes.c_float * len(files))(*scales)
        assert llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, len(files), numbers) == 0
        llama.reset()  # keys and values of other scales
        first = len(llama.tokenize(prompt.encode(), add_bos=False, special=True)) - 1
        text = llama.create_completion(prompt, max_tokens=NUM_TOKENS, temperature=0.0)["choices"][0]["text"]
        return text, torch.from_numpy(llama.scores[first : llama.n_tokens].copy())

    yield answer
    for each in loaded:
        llama_cpp.llama_adapter_lora_free(each)
    llama.close()


def same(found, wanted):
    """Check an answer and its logits against transformers'."""
    (answer, logits), (text, theirs) = found, wanted
    first, second = theirs.topk(2).values.unbind(-1)
    print(f"{text!r}: gap to the second choice at least {(first - second).min():.1e}")
    assert answer == text
    assert logits.shape == theirs.shape
    off = (logits - theirs).abs().max()
    print(f"logits off by {off:.1e} of {theirs.abs().max():.0f}")
    assert off < 1e-3  # ten times what two orders of summation make of thirty layers


@pytest.mark.parametrize("name", ["multilora", "rlora"])
def test_llama_cpp_writes_what_transformers_writes(name, base_file, tokenizer, prompts, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    plain = [by_transformers(base, tokenizer, prompt)[0] for prompt in prompts]
    torch.manual_seed(0)  # other texts may have nearer ties
    # ranks differ among the layers, so that alpha / rank is put to the test as well
    model = adapted(name, base, by=0.03, rank_pattern={"k_proj": 3})
    words, file = {}, "adapter"
    if name == "rlora":
        rows = [{"input_ids": tokenizer(prompt)["input_ids"], "task": TASKS[i % 2]} for i, prompt in enumerate(prompts)]
        words, file = {"calibration": rows, "per_task": True}, TASKS[1]
    save(model, tmp_path / "ours")
    to_gguf(tmp_path / "ours", tmp_path / "gguf", base=embedded_model(), **words)
    report = multiflora.to_lora(tmp_path / "ours", tmp_path / "lora", base=embedded_model(), **words)
    folder = next(report.folder(made) for made in report.adapters if made.task in (None, file))
    lora = PeftModel.from_pretrained(model.unload(), str(folder)).eval()
    changed = 0
    with llama_cpp_with(base_file, [tmp_path / "gguf" / f"{file}.gguf"]) as answer:
        for prompt, without in zip(prompts, plain, strict=True):
            wanted = by_transformers(lora, tokenizer, prompt)
            same(answer(prompt, [1.0]), wanted)
            changed += wanted[0] != without
    assert changed >= 3, "the adapter changes too little for a text to show it"


@pytest.mark.parametrize("per_expert", [False, True], ids=["by task", "by expert"])
def test_one_llama_cpp_writes_what_each_task_of_the_adapter_writes(per_expert, base_file, tokenizer, prompts, tmp_path):
    """All files are loaded; the scales of llama-server.json make the request's task of them, other scales a mixture."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    model = adapted("moelora", base, by=0.05, num_experts=2, r=4)
    with torch.no_grad():  # so that the tasks differ in what they take of the experts
        next(p for name, p in model.named_parameters() if "task_embedding" in name).mul_(3)
    save(model, tmp_path / "ours")
    to_gguf(tmp_path / "ours", tmp_path / "gguf", base=embedded_model(), per_expert=per_expert)
    told = json.loads((tmp_path / "gguf/llama-server.json").read_text())
    files = [tmp_path / "gguf" / word.removesuffix(":0") for word in told["options"][1::2]]
    assert len(files) == 2
    texts = []
    with llama_cpp_with(base_file, files) as answer:
        for task in TASKS:
            scales = {adapter["id"]: adapter["scale"] for adapter in told["lora"][task]}
            for prompt in prompts[:2]:
                with multiflora.task(model, task):
                    wanted = by_transformers(model, tokenizer, prompt)
                same(answer(prompt, [scales.get(number, 0.0) for number in range(2)]), wanted)
                texts.append(wanted[0])
        bare = model.unload()
        plain = [by_transformers(bare, tokenizer, prompt) for prompt in prompts[:2]]
        same(answer(prompts[0], [0.0, 0.0]), plain[0])
        config = bare.config
        names = [name for name, _ in bare.named_modules()]
        with with_pairs(bare, scaled([read_gguf(file, config, names) for file in files], [0.3, 0.9])):
            same(answer(prompts[0], [0.3, 0.9]), by_transformers(bare, tokenizer, prompts[0]))
    assert len({*texts, *(text for text, _ in plain)}) == 6, "the tasks change too little for a text to show it"
