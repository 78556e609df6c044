"""The compiled functions: the same numbers as Python's to the last bit, and no harm where they cannot be had."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from multiflora import ops
from multiflora.context import find
from multiflora.methods import METHODS, build_config
from multiflora.ops import native

pytestmark = pytest.mark.skipif(not native.compiler(), reason="no C++ compiler is here, or MULTIFLORA_NATIVE=0")

METHODS_HERE = sorted(name for name, card in METHODS.items() if card.module is not None)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def built():
    """Else the first pass, with Python, would be compared with itself."""
    assert native.serve(torch.ones(1)) is not None


def both(run, monkeypatch):
    """What ``run`` returns with the compiled functions and with Python's, from one seed."""
    torch.manual_seed(5)
    compiled = run()
    monkeypatch.setattr(native, "serve", lambda x: None)
    torch.manual_seed(5)
    return compiled, run()


def assert_equal(compiled, python):
    assert len(compiled) == len(python) > 0
    for number, (one, other) in enumerate(zip(compiled, python, strict=True)):
        if one is None or other is None:
            assert one is other, number
        else:
            assert one.dtype == other.dtype
            assert torch.equal(one, other), (number, (one - other).abs().max())


def adapted(method, dtype=torch.float32, *, bias=True, adapter_dtype=None, **words):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(21, 13, bias=bias), nn.Linear(13, 10, bias=bias)).to(dtype)
    settings = {"r": 8, "target_modules": ["0", "1"], "num_tasks": 2} | words
    model = get_peft_model(base, build_config(method, settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(adapter_dtype or torch.promote_types(dtype, torch.float32))
                weight += 0.1 * torch.randn(weight.shape).to(weight)
    return model.train()


def passes(model, shape=(2, 7, 21), dtype=torch.float32, **words):
    """Output and all gradients of a batch of two tasks."""

    def run():
        x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        model.zero_grad()
        y = model(x, task_id=torch.tensor([1, 0]), **words)
        (y.square().sum() + sum(find(model).losses)).backward()
        trained = [weight.grad for weight in model.parameters() if weight.requires_grad]
        return [y.detach(), x.grad, *(None if grad is None else grad.clone() for grad in trained)]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS_HERE)
def test_every_method_is_the_same_to_the_last_bit(method, dtype, monkeypatch):
    assert_equal(*both(passes(adapted(method, dtype), dtype=dtype), monkeypatch))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("rlora", {"head_dropout": 0.3, "num_heads": 3}),
        ("rlora", {"head_dropout": 0.3, "lora_dropout": 0.3}),
        ("rlora", {"head_dropout": 0.0, "router_z_loss": 0.1}),
        ("multilora", {"lora_dropout": 0.3}),
        ("hydralora", {"top_k": 2, "lora_dropout": 0.2, "init_weights": False}),
    ],
)
def test_masks_too(method, words, dtype, monkeypatch):
    assert_equal(*both(passes(adapted(method, dtype, **words), dtype=dtype), monkeypatch))


@pytest.mark.parametrize("words", [{"bias": False}, {"adapter_dtype": torch.bfloat16}])
def test_without_bias_and_with_adapters_in_half_precision(words, monkeypatch):
    model = adapted("rlora", torch.bfloat16, lora_alpha=7, **words)
    assert_equal(*both(passes(model, dtype=torch.bfloat16), monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 5, 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_heads_and_threads(threads, heads, dtype, monkeypatch):
    """Long enough for several pieces and threads, and for sums that torch would make in blocks."""
    settings = {"num_heads": heads, "r": 24, "head_dropout": 0.2, "lora_dropout": 0.1}
    model = adapted("rlora", dtype, **settings)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(*both(passes(model, (2, 1025, 21), dtype), monkeypatch))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given", ["base", "y", "y in another dtype"])
@pytest.mark.parametrize("parts", [(), ("router",), ("A0", "B0"), ("router", "A0", "B0")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_call_is_the_three_it_stands_for(dropout, parts, given):
    made = {
        "A": torch.randn(4, 21, requires_grad=True),
        "router": torch.randn(3, 21, requires_grad=True),
        "A0": torch.randn(4, 21),
        "B": torch.randn(13, 12, requires_grad=True),
        "B0": torch.randn(13, 4),
    }
    A, router, A0, B, B0 = (part if name in ("A", "B", *parts) else None for name, part in made.items())
    x = torch.randn(2, 7, 21, requires_grad=True)
    base = (x, torch.randn(13, 21), torch.randn(13)) if given == "base" else None
    dtype = torch.float64 if given == "y in another dtype" else torch.float32
    y = None if base else torch.randn(2, 7, 13, dtype=dtype, requires_grad=True)
    sizes, of_x, of_heads = {"num_heads": 3, "rank": 4}, (dropout, 5), (dropout, 6)
    leaves = [leaf for leaf in (x, y, A, router, B) if leaf is not None]

    def grads(summed):
        return [summed, *torch.autograd.grad(summed.square().sum(), leaves)]

    one, seen = ops.branches(
        x, A, router, A0, B, B0, y, base, **sizes, scale=2.0, stem_dropout=of_x, head_dropout=of_heads
    )
    place, u, logits, u0 = ops.stems(x, A, router, A0, base and base[1], scale=2.0, dropout=of_x)
    gate = None if logits is None else ops.softmax(logits)
    three = ops.heads(place if y is None else y, u, u0, gate, B, B0, base, **sizes, dropout=of_heads)
    assert_equal(grads(one), grads(three))
    if gate is None:
        assert seen is None
    else:
        assert torch.equal(seen, gate)
        assert not seen.requires_grad


@pytest.mark.parametrize(
    ("method", "words", "calls"),
    [
        ("rlora", {}, 1),
        ("multilora", {"lora_dropout": 0.1}, 1),
        ("rlora", {"router_z_loss": 0.1}, 2),  # a loss reads the logits
        ("mixlora", {}, 2),  # the best k of the heads
        ("moelora", {}, 2),  # a gate of the task
        ("mtllora", {}, 2),  # a matrix between stem and heads
    ],
)
def test_a_layer_is_one_call_where_nobody_looks_between(method, words, calls, monkeypatch):
    seen, functions = [], native.serve(torch.ones(1))

    def counting(name):
        return lambda *values: seen.append(name) or getattr(functions, name)(*values)

    counted = native.Functions(*map(counting, native.Functions._fields))
    monkeypatch.setattr(native, "serve", lambda x: counted)
    model = adapted(method, **words)
    model(torch.randn(2, 7, 21), task_id=torch.tensor([1, 0]))
    assert seen == [["branches"], ["stems", "heads"]][calls - 1] * 2


@pytest.mark.parametrize("width", [4, 1023, 1024, 1030, 2049])
def test_masks_longer_than_a_block(width, monkeypatch):
    x = torch.randn(3, width, requires_grad=True)
    A, B = torch.randn(2, width, requires_grad=True), torch.randn(5, 6, requires_grad=True)

    def run():
        _, u, _, _ = ops.stems(x, A, None, None, dropout=(0.4, 8))
        wide = torch.ones(2, width, requires_grad=True)
        y = ops.heads(torch.zeros(width, 5), wide, None, None, B, None, num_heads=3, rank=2, dropout=(0.4, 9))
        return [u, y, *torch.autograd.grad((u.sum(), y.sum()), (x, A, wide, B))]

    assert_equal(*both(run, monkeypatch))


def test_a_base_that_somebody_watches_keeps_its_own_product(monkeypatch):
    model = adapted("rlora", head_dropout=0.2)
    for layer in model.base_model.model:
        layer.base_layer.register_forward_hook(lambda *_: None)
    assert_equal(*both(passes(model), monkeypatch))


def test_only_what_is_asked_for_gets_a_gradient(monkeypatch):
    model = adapted("rlora")
    layer = model.base_model.model[1]
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    x = torch.randn(3, 13)

    def run():
        y = layer(x)
        return [*torch.autograd.grad(y.sum(), trained[:1], retain_graph=True), *torch.autograd.grad(y.sum(), trained)]

    assert_equal(*both(run, monkeypatch))


def test_an_empty_batch_and_a_single_token():
    layer = adapted("rlora").base_model.model[1]
    assert layer(torch.randn(0, 13)).shape == (0, 10)
    assert layer(torch.randn(2, 0, 13)).shape == (2, 0, 10)
    assert layer(torch.randn(13)).shape == (10,)
    with torch.inference_mode():
        assert layer(torch.randn(2, 3, 13)).shape == (2, 3, 10)


def test_shapes_that_do_not_fit_are_refused_as_torch_refuses_them():
    layer = adapted("rlora").base_model.model[1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(2, 5))
    with pytest.raises(RuntimeError, match="do not fit beside the others"):
        ops.stems(torch.randn(2, 5), torch.randn(2, 5), torch.randn(3, 6), None)
    u = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="do not fit beside the others"):
        ops.heads(torch.randn(3, 4), u, u, None, torch.randn(4, 2), torch.randn(5, 2), num_heads=1, rank=2)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_gate_and_a_u_that_do_not_fit_are_refused(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "serve", lambda x: None)
    y, B, sizes = torch.randn(4, 5), torch.randn(5, 6), {"num_heads": 3, "rank": 2}
    u, gate = torch.randn(2, 4), torch.rand(3, 4)
    for wrong_u, wrong_gate in ((u, gate[:2]), (u, gate[:, :3]), (torch.randn(4, 4), gate)):
        with pytest.raises(RuntimeError):
            ops.heads(y, wrong_u, None, wrong_gate, B, None, **sizes)
    x, A, router = torch.randn(4, 7), torch.randn(2, 7), torch.randn(4, 7)
    with pytest.raises(RuntimeError):
        ops.branches(x, A, router, None, B, None, y, None, **sizes)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_gradient_of_a_gradient_is_refused(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "serve", lambda x: None)
    x = torch.randn(2, 13, requires_grad=True)
    (grad,) = torch.autograd.grad(adapted("rlora").base_model.model[1](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_what_they_are_not_for():
    class Marked(torch.Tensor):
        pass

    assert native.serve(torch.ones(1, device="meta")) is None
    assert native.serve(torch.ones(1).as_subclass(Marked)) is None
    assert torch.func.vmap(lambda x: torch.ones(()) if native.serve(x) else torch.zeros(()))(torch.ones(2)).sum() == 0


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a process that has loaded nothing, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_functions", None)
    monkeypatch.setattr(native, "_tried", "not yet")
    monkeypatch.setattr(native, "_failed", "")
    monkeypatch.setattr(native, "_said", False)
    return tmp_path


def made_compiler(folder: Path, script: str) -> str:
    path = folder / "my-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_only_training_builds(fresh, monkeypatch):
    builds = []
    monkeypatch.setattr(native, "_build", builds.append)
    with torch.no_grad():
        assert native.serve(torch.ones(1)) is None
        assert native.serve(torch.ones(1)) is None
    assert not builds
    native.serve(torch.ones(1))
    native.serve(torch.ones(1))
    assert builds == [native.library_file()]


def test_what_trains_nothing_can_ask_for_the_build(fresh, monkeypatch):
    builds = []
    monkeypatch.setattr(native, "_build", builds.append)
    with torch.no_grad():
        native.serve(torch.ones(1))
        native.prepare()
        native.prepare()
    assert builds == [native.library_file()]


def test_a_compiler_that_fails_is_named_once_and_leaves_nothing(fresh, monkeypatch, caplog):
    failing = made_compiler(fresh, 'echo "something else" >&2; echo "packed.cpp: fatal error: no space" >&2; exit 1')
    monkeypatch.setenv("CXX", failing)
    with caplog.at_level(logging.WARNING):
        model = adapted("rlora")
        for _ in range(2):
            model(torch.randn(2, 21)).sum().backward()
    (message,) = [record.getMessage() for record in caplog.records if record.name == native.__name__]
    assert "packed.cpp: fatal error: no space. Set MULTIFLORA_NATIVE=0" in message
    assert not [path for path in fresh.rglob("*") if path.is_file() and path.suffix not in (".lock", "")]


def test_a_cache_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch, caplog):
    blocked = fresh / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with caplog.at_level(logging.WARNING):
        assert native.serve(torch.ones(1)) is None
    assert "Python computes them" in caplog.text


def test_a_user_without_a_home_is_no_obstacle(fresh, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with caplog.at_level(logging.WARNING):
        assert native.serve(torch.ones(1)) is None
    assert "Could not determine home directory." in caplog.text
    assert native.state() == (False, "computed by Python: Could not determine home directory.")


def test_a_file_that_is_no_library_is_no_obstacle(fresh, caplog):
    file = native.library_file()
    file.parent.mkdir(parents=True)
    file.write_text("half a library")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_suffix(".sha256").write_text(digest)
    with caplog.at_level(logging.WARNING):
        assert native.serve(torch.ones(1)) is None
    assert str(file) in caplog.text


@pytest.fixture(scope="module")
def whole():
    """The library that all tests use, in the user's own cache."""
    return native.library_file()


def planted(whole, fresh):
    """The same library in the empty cache of this test."""
    file = native.library_file()
    file.parent.mkdir(parents=True)
    for folder in (file.parent, file.parent.parent):
        folder.chmod(0o700)
    file.write_bytes(whole.read_bytes())
    file.with_suffix(".sha256").write_bytes(whole.with_suffix(".sha256").read_bytes())
    return file


def writable(path):
    path.chmod(path.stat().st_mode | 0o020)


def other_content(file):
    file.write_bytes(file.read_bytes() + b"planted")


def link(file):
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: None, None),
        (other_content, "is not what was built"),
        (lambda file: file.with_suffix(".sha256").write_text("0" * 64), "is not what was built"),
        (lambda file: writable(file), "may be written to by others"),
        (lambda file: writable(file.parent), "may be written to by others"),
        (lambda file: file.parent.parent.chmod(0o707), "may be written to by others"),
        (link, "is a link"),
        (lambda file: os.chown(file, 12345, -1), "belongs to another user"),
    ],
    ids=["whole", "content", "digest", "file", "folder", "folder above", "link", "owner"],
)
def test_a_library_that_somebody_may_have_planted_is_not_loaded(damage, says, whole, fresh, monkeypatch, caplog):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    file = planted(whole, fresh)
    if says == "belongs to another user" and os.getuid() != 0:
        pytest.skip("only root gives files away")
    damage(file)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            native._tried = "not yet"
            native.serve(torch.ones(1))
    if says is None:
        assert loaded == [str(file)] * len(loaded) != []
        assert native.state() == (True, f"compiled, {file}")
        return
    assert not loaded
    (message,) = [record.getMessage() for record in caplog.records if record.name == native.__name__]
    assert says in message
    compiled, sentence = native.state()
    assert not compiled
    assert says in sentence


def test_a_library_without_a_digest_is_built_anew(whole, fresh, monkeypatch):
    planted(whole, fresh).with_suffix(".sha256").unlink()
    builds = []
    monkeypatch.setattr(native, "_build", builds.append)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it was loaded"))
    assert native.serve(torch.ones(1)) is None
    assert builds == [native.library_file()]


class Wrong:
    """In the place of ``torch.ops.multiflora``: functions that are not there, take other words, or compute wrongly."""

    def __init__(self, **functions):
        for name, function in functions.items():
            setattr(self, name, type("Packet", (), {"default": staticmethod(function)}))


@pytest.mark.parametrize(
    "library",
    [
        Wrong(),
        Wrong(stems=len, heads=len, branches=lambda x: x),
        Wrong(stems=len, heads=len, branches=lambda *values: (torch.zeros(1, 2), None)),
    ],
    ids=["no functions", "other arguments", "other numbers"],
)
def test_a_library_that_loads_and_is_wrong_is_not_used(library, whole, fresh, monkeypatch, caplog):
    planted(whole, fresh)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "multiflora", library, raising=False)
    with caplog.at_level(logging.WARNING):
        assert native.serve(torch.ones(1)) is None
    assert "Python computes them" in caplog.text
    assert not native.state()[0]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MULTIFLORA_NATIVE", "0", "MULTIFLORA_NATIVE=0 is set"),
        ("CXX", "no-such-program", "no C++ compiler was found"),
        ("CXX", '"an open quote', "no C++ compiler was found"),
    ],
)
def test_where_it_is_not_wanted_or_cannot_be_built(variable, value, says, fresh, monkeypatch, caplog):
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            native._tried = "not yet"
            assert native.serve(torch.ones(1)) is None
    # said once, unless it was asked for
    assert len(caplog.records) == (variable != "MULTIFLORA_NATIVE")
    assert variable == "MULTIFLORA_NATIVE" or "No C++ compiler was found" in caplog.text
    compiled, sentence = native.state()
    assert not compiled
    assert says in sentence


def test_the_compiler_may_be_a_command_with_words(fresh, monkeypatch):
    monkeypatch.setenv("CXX", f"{made_compiler(fresh, 'exit 1')} -O1 '-DA B'")
    assert native.compiler()[1:] == ["-O1", "-DA B"]
    before = native.library_file()
    monkeypatch.delenv("CXX")
    assert native.library_file() != before


def test_the_library_is_for_this_processors_vectors(monkeypatch):
    files = set()
    for capability in ("DEFAULT", "AVX2", "AVX512", "SVE256"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        files.add(native.library_file())
    assert len(files) == 3


def test_two_processes_build_once(fresh):
    """The compiler here counts its calls and hands out the library that this machine has."""
    calls = fresh / "calls"
    environment = os.environ | {"XDG_CACHE_HOME": str(fresh)}
    environment.pop("CXX", None)
    counting = f'echo call >> {calls}\nexec {" ".join(native.compiler())} "$@" -O0'
    environment["CXX"] = made_compiler(fresh, counting)
    program = "import torch; from multiflora.ops import native; assert native.serve(torch.ones(1)) is not None"
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert calls.read_text().split() == ["call"]
