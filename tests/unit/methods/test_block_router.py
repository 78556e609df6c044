"""One router for a block: which layers share it, where it is kept, who may take the gate, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from contract.cases import IDS, stir
from made_adapters import save
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, OPTConfig, OPTForCausalLM

import multiflora
from multiflora.adapter_folder import check_adapter
from multiflora.analysis.routing import recording
from multiflora.comparison.budget import adapted_widths, count_flops, count_parameters
from multiflora.context import find
from multiflora.errors import AdapterError, ConfigError, ExportError
from multiflora.estimate import count_parameters as count_on_model
from multiflora.export.expand import expand
from multiflora.methods import build_config, describe
from multiflora.methods.block_router import block_group
from multiflora.methods.layer import BranchLinear
from multiflora.serve.mixed import Mixed
from multiflora.serve.models import load_served

MLP = ["gate_proj", "up_proj", "down_proj"]
OTHERS = torch.tensor([[8, 3, 3, 19, 2, 44, 31], [1, 4, 9, 16, 25, 36, 49]])


def adapted(base, name="mixlora", **settings):
    words = {"target_modules": MLP, "router_per": "block", "lora_dropout": 0.0}
    return get_peft_model(base, build_config(name, words | settings))


def routers(model):
    """Names of the layers that hold a router, without the model's own part."""
    return [name.rpartition(".mf_")[0].partition("layers.")[2] for name in model.state_dict() if "_router." in name]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0.layer.1.EncDecAttention.k"),
        ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.attention.output.dense"),
        ("model.decoder.layers.3.fc2", "model.decoder.layers.3"),
        ("experts.1", "experts.1"),
        ("lm_head", "lm_head"),
    ],
)
def test_who_shares(name, group):
    assert block_group(None, name) == group


def test_the_first_layer_of_a_block_holds_the_router_and_attention_has_its_own(tiny_llama):
    model = adapted(tiny_llama(), target_modules="all-linear", init_seed=1)
    attention = [f"{block}.self_attn.{own}_proj" for block in (0, 1) for own in "qkvo"]
    assert sorted(routers(model)) == sorted([*attention, "0.mlp.gate_proj", "1.mlp.gate_proj"])
    gate, down = (getattr(model.base_model.model.model.layers[0].mlp, name) for name in ("gate_proj", "down_proj"))
    assert down.parts("default")["router"] is gate.parts("default")["router"]
    assert "router" not in down.state_dict()
    published = adapted(tiny_llama(), target_modules="all-linear", heads_pattern={"self_attn.*": 1})
    assert [len(t) for name, t in published.state_dict().items() if "_router." in name] == [1, 1, 1, 1, 8] * 2
    partly = adapted(tiny_llama(), target_modules=["up_proj", "down_proj"])
    assert routers(partly) == ["0.mlp.up_proj", "1.mlp.up_proj"]


def test_a_block_that_is_no_module_of_its_own():
    words = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = OPTForCausalLM(OPTConfig(**words, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0)).eval()
    model = stir(adapted(base, target_modules=["fc1", "fc2"])).eval()
    assert routers(model) == ["0.fc1"]
    layer = model.base_model.model.model.decoder.layers[0]
    seen = []
    layer.fc1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    find(model).recorder = lambda name, gate, tasks: seen.append(gate)
    with torch.no_grad():
        model(IDS)
    first, entered, second = seen  # fc1's gate is recorded before its hook is called
    assert torch.equal(first, second)
    router = layer.fc1.parts("default")["router"]
    logits = entered.reshape(-1, 16) @ router.t()
    assert torch.equal((first > 0).sum(1), torch.full((14,), 2))
    assert torch.equal(first.argmax(1), logits.argmax(1))


def test_saved_once_loaded_and_checked_without_the_base(tiny_llama, tmp_path):
    model = stir(adapted(tiny_llama())).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    own = [name for name in tensors if name.endswith("mf_mixlora_router")]
    assert [name.split("layers.")[1] for name in own] == [f"{i}.mlp.gate_proj.mf_mixlora_router" for i in (0, 1)]
    check_adapter(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    save_file({name: tensor for name, tensor in tensors.items() if name != own[1]}, path)
    with pytest.raises(AdapterError, match=r"tensor .*layers\.1\.mlp\.\w+\.mf_mixlora_router is missing"):
        check_adapter(tmp_path)
    save_file(tensors | {own[0].replace("gate_proj", "up_proj"): tensors[own[0]].clone()}, path)
    with pytest.raises(AdapterError, match=r"up_proj\.mf_mixlora_router is not one of mixlora's"):
        check_adapter(tmp_path)


def test_an_adapter_that_was_saved_before_has_a_router_for_each_layer(tiny_llama, tmp_path):
    model = adapted(tiny_llama(), router_per="layer")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    words = [line for line in path.read_text().splitlines() if "router_per" not in line and "heads_pattern" not in line]
    path.write_text("\n".join(words))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].router_per == "layer"
    assert len(routers(loaded)) == 6


@pytest.mark.parametrize("targets", ["all-linear", MLP])
def test_counted_without_the_model(targets, tiny_llama):
    base = tiny_llama()
    settings = {"target_modules": targets, "router_per": "block", "num_experts": [3, 4]}
    widths, config = adapted_widths(base.config, settings), build_config("mixlora", settings)
    assert count_parameters(describe("mixlora"), config, widths) == count_on_model(get_peft_model(base, config))[0]
    apart = build_config("mixlora", settings | {"router_per": "layer"})
    spared = count_flops(describe("mixlora"), apart, widths).forward
    spared -= count_flops(describe("mixlora"), config, widths).forward
    assert spared == 2 * (3 + 4) * (32 + 48)


def test_two_threads_do_not_take_each_other_s_gate(tiny_llama):
    model = stir(adapted(tiny_llama())).eval()
    with torch.no_grad():
        wanted = [model(ids).logits for ids in (IDS, OTHERS)]
    together, found = threading.Barrier(2), [None, None]

    def wait(module, args):
        together.wait(timeout=60)

    # both have left a gate before one of them goes on
    for layer in model.base_model.model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(wait)

    def run(number, ids):
        with torch.no_grad():
            found[number] = model(ids).logits

    threads = [threading.Thread(target=run, args=(n, ids)) for n, ids in enumerate((IDS, OTHERS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_two_passes_before_their_gradients(tiny_llama):
    """With blocks computed again for the gradient, each pass's blocks find their own gates."""
    model = stir(adapted(tiny_llama())).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        return torch.autograd.grad(sum(model(ids, labels=ids).loss for ids in (IDS, OTHERS)), trained)

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(gradients(), plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("loramoe", {"balance_weight": 0.1}), ("mixlora", {}), ("rlora", {"router_z_loss": 0.1})],
)
def test_what_is_added_to_the_loss_counts_a_block_once_and_nothing_is_kept(name, weights, tiny_llama):
    model = stir(adapted(tiny_llama(), name, **weights)).train()
    model(IDS, labels=IDS).loss.backward()
    assert len(find(model).losses) == 2
    assert find(model)._here.last.gates == {}


def test_generation_with_a_cache_of_fixed_size(tiny_llama):
    model = stir(adapted(tiny_llama(), task_type="CAUSAL_LM")).eval()
    settings = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "eos_token_id": 999}
    expected = IDS
    with torch.no_grad():
        find(model).loop = True
        for _ in range(6):  # without a cache, and without prepared branches
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
        find(model).loop = False
    assert torch.equal(model.generate(**settings), expected)
    assert torch.equal(model.generate(**settings, cache_implementation="static"), expected)


def test_rows_of_one_adapter_served_by_task_keep_their_gates(tiny_llama, tmp_path):
    """The server computes the groups of a layer one after another, so a gate must stay with its group."""
    parts = {"gate": "token", "num_heads": 3, "task_matrix": "full", "task_names": ["verse", "prose"]}
    save(stir(adapted(tiny_llama(), "parts", **parts)), tmp_path / "parts")
    save(stir(adapted(tiny_llama()), seed=4), tmp_path / "mixlora")
    models = load_served(tiny_llama(), "base", {name: tmp_path / name for name in ("parts", "mixlora")})
    mixed = Mixed(models["base"].model, models)
    ids, names, tasks = torch.cat((IDS, OTHERS)), ["parts", "parts", "mixlora", "base"], [0, 1, None, None]
    with torch.no_grad():
        found = mixed.forward(ids, names, tasks).logits
        for row, (name, task) in enumerate(zip(names, tasks, strict=True)):
            words = {} if task is None else {"task_id": [task]}
            assert torch.allclose(found[row], models[name].model(ids[row : row + 1], **words).logits[0], atol=1e-5)


def test_converted_with_the_gate_of_the_block(tiny_llama, tmp_path):
    model = stir(adapted(tiny_llama())).eval()
    rows = [{"input_ids": ids.tolist()} for ids in (*IDS, OTHERS[0])]
    report = multiflora.to_lora(model, tmp_path / "plain", calibration=rows)
    with recording(model, 0) as gates, torch.no_grad():
        model(torch.tensor([row["input_ids"] for row in rows]))
    written = load_file(tmp_path / "plain/adapter_model.safetensors")
    found = gates.result()
    for layer in report.adapters[0].layers:
        A, B = model.get_submodule(f"base_model.model.{layer.name}").factors(
            "default", torch.tensor(found[layer.name].load)
        )
        stem = f"base_model.model.{layer.name}.lora_"
        assert torch.allclose(written[f"{stem}B.weight"] @ written[f"{stem}A.weight"], B @ A, atol=1e-5)
    assert len({str(found[f"model.layers.0.mlp.{name}"].load) for name in MLP}) == 1


def test_a_layer_that_runs_before_the_first_says_so(tiny_llama):
    model = adapted(tiny_llama())
    mlp = model.base_model.model.model.layers[1].mlp
    with pytest.raises(
        AdapterError, match=r"1\.mlp\.down_proj takes the gate that .*1\.mlp\.gate_proj, .*not been called"
    ):
        mlp.down_proj(torch.zeros(2, 48))
    mlp.gate_proj(torch.zeros(3, 32))
    with pytest.raises(AdapterError, match=r"gate_proj has seen 3 tokens; expected the same 2 tokens"):
        mlp.down_proj(torch.zeros(2, 48))
    assert mlp.down_proj(torch.zeros(3, 48)).shape == (3, 32)
    with torch.no_grad():  # a pass forgets its gates, and those left outside of one
        model(IDS)
    with pytest.raises(AdapterError, match="has not been called before it"):
        mlp.down_proj(torch.zeros(3, 48))


def test_a_deleted_adapter_gives_its_place_back(tiny_llama):
    model = adapted(tiny_llama())
    model.add_adapter("two", build_config("mixlora", {"target_modules": MLP, "router_per": "block"}))
    model.delete_adapter("default")
    assert all("default" not in layer.holders for layer in model.modules() if isinstance(layer, BranchLinear))
    model.add_adapter("default", build_config("mixlora", {"target_modules": MLP}))
    model.set_adapter("default")
    assert len([name for name in model.state_dict() if name.endswith("router.default")]) == 6


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mixlora", {"router_per": "token"}, "router_per is 'token'; it must be one of 'layer', 'block'"),
        (
            "mixlora",
            {"router_per": "block", "target_parameters": ["experts.down_proj"]},
            "does not go with target_param",
        ),
        (
            "parts",
            {"router_per": "block", "gate": "task", "num_tasks": 2},
            "router_per belongs to a router on x, and gate is",
        ),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(name, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "none of the adapted layers is in a feed-forward block"),
        ({"target_modules": ["down_proj"]}, "layers.0.mlp is read by gate_proj, which is not adapted.*Add 'gate_proj'"),
        ({"heads_pattern": {"up_proj": 3}}, r"gate_proj has 8 heads where model.layers.0.mlp.up_proj has 3"),
    ],
)
def test_settings_that_do_not_fit_the_model_change_nothing(settings, message, tiny_llama):
    base = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        adapted(base, **settings)
    assert not any(isinstance(module, BranchLinear) for module in base.modules())


def test_a_model_without_such_blocks_is_refused():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertModel(BertConfig(vocab_size=50, **shape))
    with pytest.raises(AdapterError, match="a module that holds two linear layers or more"):
        adapted(base, target_modules=["dense"])


def test_a_lora_is_not_expanded_to_it(tiny_llama, tmp_path):
    from peft import LoraConfig

    stir(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=MLP))).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="router_per is 'block', and which layer of a block comes first"):
        expand(tmp_path / "lora", tmp_path / "more", router_per="block")


def test_it_is_not_merged(tiny_llama):
    with pytest.raises(ExportError, match="its router reads the input"):
        adapted(tiny_llama()).merge_and_unload()
