"""The contract of other people's code: what works on peft's LoRA works here, or is refused in a sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import forward_ad

from contract.cases import IDS, TASKS, layers, logits, relative, stir
from multiflora import AdapterError, ConfigError, context

WEIGHTS = "adapter_model.safetensors"


def disable_as_trl_does(model):
    """``trl.trainer.utils.disable_dropout_in_model``."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def evaluate_dropout(model):
    """The other usual way."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


@pytest.mark.parametrize("switch_off", [disable_as_trl_does, evaluate_dropout])
def test_dropout_switched_off(case, tiny_llama, switch_off):
    """What switches a model's nn.Dropout off switches an adapter's off, also that of one loaded later."""
    model = case.trained(tiny_llama(), lora_dropout=0.3)
    expected = logits(model)
    model.train()
    with torch.no_grad():
        assert relative(model(input_ids=IDS, task_id=TASKS).logits, expected) > 1e-3
        switch_off(model)
        assert relative(model(input_ids=IDS, task_id=TASKS).logits, expected) < 1e-6
    model.eval()
    model.add_adapter("late", case.config(lora_dropout=0.3))
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    assert torch.equal(logits(model), expected)


def plain(case):
    """Two adapted layers in no transformer, and an input."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = stir(get_peft_model(base, case.config(target_modules=["0", "2"], task_names=["verse"]))).eval()
    return model.get_base_model(), torch.randn(4, 6)


def test_torch_func(case):
    """torch.func's grad, jvp, vmap and hessian, and forward-mode differentiation, agree with autograd."""
    model, x = plain(case)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert torch.allclose(torch.func.grad(lambda x: model(x).square().sum())(x), leaf.grad, atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(model, x)
    _, moved = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert torch.allclose(moved, jacobian.sum((2, 3)), atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
    assert torch.allclose(dual.tangent, moved, atol=1e-5)
    assert torch.allclose(torch.func.vmap(model)(x), model(x), atol=1e-5)
    assert torch.func.hessian(lambda x: model(x).square().sum())(x[0]).shape == (6, 6)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    grads = torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).square().sum())(weights)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(grads[name], weight.grad, rtol=1e-4, atol=1e-5), name


def test_jit_trace(case):
    """torch.jit.trace records a function that holds for other inputs."""
    model, x = plain(case)
    with torch.no_grad():
        traced, other = torch.jit.trace(model, x), torch.randn(4, 6)
        assert torch.allclose(traced(other), model(other), atol=1e-5)


def test_global_module_hooks(case):
    """A hook on all modules sees the base layer's call, as it sees everybody else's."""
    model, x = plain(case)
    bases, seen = {id(layer.base_layer) for layer in layers(model)}, []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(id(module)))
    try:
        hooked = model(x)
    finally:
        handle.remove()
    assert bases <= set(seen)
    assert torch.allclose(model(x), hooked, atol=1e-6)


def test_hot_swap(case, tiny_llama, tmp_path):
    """peft's hot-swap puts an adapter of the same method and shape in another's place; any other is refused."""
    mine, other = case.trained(tiny_llama(), seed=1), case.trained(tiny_llama(), seed=2)
    other.save_pretrained(tmp_path / "other")
    expected, before = logits(other), logits(mine)
    if case.merges == "exactly":
        mine.merge_adapter()
        with pytest.raises(AdapterError, match=r"merged into the base weights.*unmerge_adapter"):
            hotswap_adapter(mine, str(tmp_path / "other"), "default", torch_device="cpu")
        mine = case.trained(tiny_llama(), seed=1)
    case.trained(tiny_llama(), lora_alpha=3).save_pretrained(tmp_path / "strong")
    with pytest.raises(ValueError, match=r"Configs are incompatible: for lora_alpha"):
        hotswap_adapter(mine, str(tmp_path / "strong"), "default", torch_device="cpu")
    state = load_file(tmp_path / "other" / WEIGHTS)
    save_file(dict(list(state.items())[1:]), tmp_path / "other" / WEIGHTS)
    with pytest.raises(AdapterError, match=r"is missing \(1 of"):
        hotswap_adapter(mine, str(tmp_path / "other"), "default", torch_device="cpu")
    assert torch.equal(logits(mine), before)
    save_file(state, tmp_path / "other" / WEIGHTS)
    hotswap_adapter(mine, str(tmp_path / "other"), "default", torch_device="cpu")
    assert torch.equal(logits(mine), expected)


def test_what_is_for_two_factors(case, tiny_llama, refused):
    """add_weighted_adapter and layer_replication are refused in a sentence."""
    model = case.adapt(tiny_llama())
    with pytest.raises(AdapterError, match=r"add_weighted_adapter is not there for .*several adapters active"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ConfigError, match=r"layer_replication is .*another base model") as raised:
        case.config(layer_replication=[[0, 2], [1, 2]])
    refused(raised.value)


class Watched(nn.Module):
    """Attention and an encoder layer as torch has them, and a block as Mamba's."""

    def __init__(self, kind=""):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8)
        self.mixer = nn.ModuleDict({"in_proj": nn.Linear(8, 8), "out_proj": nn.Linear(8, 8)})
        self.config = {"model_type": kind}


@pytest.mark.parametrize(
    ("module", "kind", "says"),
    [
        ("attention.out_proj", "", "nn.MultiheadAttention"),
        ("encoder.self_attn.out_proj", "", "nn.MultiheadAttention"),
        ("encoder.linear1", "", "set_fastpath_enabled"),
        ("mixer.out_proj", "falcon_h1", "a Mamba block"),
        ("mixer.out_proj", "nemotron_h", "a Mamba block"),
        ("mixer.out_proj", "A_log", "a Mamba block"),
    ],
)
def test_weights_that_are_read_past_the_layer(case, refused, module, kind, says):
    """Layers whose weight is read past them are refused: MHA's out_proj, the encoder's fast path, Mamba blocks."""
    base = Watched()
    if kind == "A_log":
        base.mixer.A_log = nn.Parameter(torch.zeros(8))
    base.config = type("Config", (), {"model_type": kind, "to_dict": lambda self: {"model_type": kind}})()
    with pytest.raises(AdapterError, match=rf"{module} belongs to .*{says}.*would pass the adapter by") as raised:
        get_peft_model(base, case.config(target_modules=["in_proj", module]))
    assert not list(layers(base))
    refused(raised.value)


def damaged(state):
    """Every kind of damage to an adapter's tensors, and what is said of it."""
    name = next(name for name in state if name.endswith("B"))
    nan, infinite = state[name].clone(), state[name].clone()
    nan[0, 0], infinite[-1, -1] = torch.nan, torch.inf
    layer = name.rpartition(".")[0]
    yield "is missing", {key: value for key, value in state.items() if key != name}
    yield "is missing", {key: value for key, value in state.items() if not key.startswith(layer)}
    yield "holds NaN or infinity", state | {name: nan}
    yield "holds NaN or infinity", state | {name: infinite}
    yield "has shape", state | {name: state[name][:, :-1].contiguous()}
    if state[name].shape[0] != state[name].shape[1]:
        yield "has shape", state | {name: state[name].t().contiguous()}
    yield "is of type", state | {name: state[name].to(torch.int32)}
    yield "has no place", state | {name.replace("layers.0", "layers.7"): state[name].clone()}


def test_damaged_tensors_are_refused(case, tiny_llama, tmp_path, refused):
    """A damaged adapter is refused whoever loads it, names the tensor and changes nothing."""
    model = case.trained(tiny_llama())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    fresh = tiny_llama()
    for says, state in damaged(whole):
        with pytest.raises(AdapterError, match=says) as raised:
            set_peft_model_state_dict(model, state)
        save_file(state, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=says):
            model.load_adapter(str(tmp_path), "two")
        assert list(model.peft_config) == ["default"]
        if says != "is of type":  # transformers casts what it reads and does not say what it was
            with pytest.raises(AdapterError, match=f"{says}|does not fit the model"):
                fresh.load_adapter(str(tmp_path), adapter_name="two")
            assert not any(layer.configs for layer in layers(fresh))
        with pytest.raises(AdapterError, match=says):
            PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected)
    refused(raised.value)


def test_a_whole_state_is_taken(case, tiny_llama):
    """get_peft_model_state_dict and set_peft_model_state_dict go together, between types and adapter names."""
    model, other = case.trained(tiny_llama(), seed=1), case.trained(tiny_llama(), seed=2)
    state = {name: value.to(torch.bfloat16) for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(other, copy.deepcopy(state))
    set_peft_model_state_dict(model, state)
    assert torch.equal(logits(other), logits(model))
    assert list(context.find(other).configs) == ["default"]
