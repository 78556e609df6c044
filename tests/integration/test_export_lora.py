"""A converted adapter computes what the adapter computes, also where multiflora cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from made_adapters import BETWEEN, BY_TASK, EXACT, OURS, ROUTED, TASKS, adapted, save
from peft import PeftModel
from safetensors.torch import load_file, save_file

import multiflora
from multiflora import ExportError

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 23, 8, 46, 2]])
ROWS = [{"input_ids": [(7 * i + 3 * j) % 49 + 1 for j in range(9 + i % 4)], "task": TASKS[i % 2]} for i in range(24)]

STOCK = """
import sys, importlib.abc
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "multiflora":
            raise ImportError("multiflora is not installed here")
sys.meta_path.insert(0, Blocker())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, ids, out = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3]
logits = {}
for folder in sys.argv[4:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        logits[folder] = model(ids).logits
torch.save(logits, out)
try:
    import multiflora
except ImportError:
    pass
else:
    raise SystemExit("multiflora could be imported")
"""


def logits_of(model, task=None):
    with torch.no_grad():
        if task is None:
            return model(IDS).logits
        with multiflora.task(model, task):
            return model(IDS).logits


def in_stock_peft(base, folders, tmp_path, ids=IDS):
    """Logits of each folder's adapter, computed in a process where multiflora cannot be imported."""
    base.save_pretrained(tmp_path / "base")
    torch.save(ids, tmp_path / "ids.pt")
    words = [str(tmp_path / "base"), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt"), *map(str, folders)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK, *words], check=True)
    return torch.load(tmp_path / "out.pt")


def test_stock_peft_gives_the_same_logits_where_multiflora_cannot_be_imported(tiny_llama, tmp_path):
    wanted = {}
    for name in EXACT:
        model = adapted(name, tiny_llama(), rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 6})
        report = multiflora.to_lora(save(model, tmp_path / f"{name}-ours"), tmp_path / name)
        assert report.exact
        wanted[str(tmp_path / name)] = logits_of(model)
    for name in BY_TASK:
        model = adapted(name, tiny_llama())
        report = multiflora.to_lora(model, tmp_path / name)
        assert report.exact
        assert [adapter.task for adapter in report.adapters] == TASKS
        for task in TASKS:
            wanted[str(tmp_path / name / task)] = logits_of(model, task)
    plain = logits_of(tiny_llama())
    found = in_stock_peft(tiny_llama(), wanted, tmp_path)
    for folder, logits in wanted.items():
        assert (logits - plain).abs().max() > 0.01, f"{folder}: the adapter does nothing, so the test would not see it"
        assert (found[folder] - logits).abs().max() < 1e-5, folder


def test_ranks_are_those_of_the_stacked_factors(tiny_llama, tmp_path):
    ranks = {}
    for name, settings in {
        "multilora": {"r": 2, "num_modules": 3},
        "mlora": {"r": 3},
        "moelora": {"r": 8, "num_experts": 4},
        "mtllora": {"r": 5},
    }.items():
        report = multiflora.to_lora(adapted(name, tiny_llama(), **settings), tmp_path / name, task=_first(name))
        ranks[name] = {layer.rank for layer in report.adapters[0].layers}
    assert ranks == {"multilora": {6}, "mlora": {6}, "moelora": {8}, "mtllora": {5}}
    zero = multiflora.to_lora(adapted("mlora", tiny_llama(), r=3, init_weights="zero"), tmp_path / "zero")
    assert zero.adapters[0].rank == 3


def _first(name):
    return TASKS[0] if name in BY_TASK else None


def test_alpha_equals_r_in_every_layer_so_that_servers_agree_on_the_scale(tiny_llama, tmp_path):
    model = adapted("mlora", tiny_llama(), rank_pattern={"q_proj": 7}, alpha_pattern={"up_proj": 3.0}, use_rslora=True)
    multiflora.to_lora(model, tmp_path / "plain")
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 14
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["use_rslora"] is False
    base = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain")).eval()
    assert (logits_of(base) - logits_of(model)).abs().max() < 1e-5


def test_modules_saved_in_full_and_biases_come_along(tiny_llama, tmp_path):
    model = adapted("mlora", tiny_llama(attention_bias=True), modules_to_save=["lm_head"], bias="all")
    multiflora.to_lora(model, tmp_path / "plain")
    base = PeftModel.from_pretrained(tiny_llama(attention_bias=True), str(tmp_path / "plain")).eval()
    assert (logits_of(base) - logits_of(model)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["mlora", "lora"])
def test_a_smaller_rank_reports_the_energy_it_loses(name, tiny_llama, tmp_path):
    model = adapted(name, tiny_llama())
    folder = save(model, tmp_path / "ours")
    report = multiflora.to_lora(folder, tmp_path / "plain", rank=1)
    assert not report.exact
    layer = report.adapters[0].layers[0]
    assert layer.rank == 1
    assert 0 < layer.energy_lost < 1
    module = model.get_submodule(f"base_model.model.{layer.name}")
    delta = module.get_delta_weight("default").detach().double()
    energy = torch.linalg.svdvals(delta).square()
    assert layer.energy_lost == pytest.approx(float(1 - energy[0] / energy.sum()), rel=1e-4)
    written = load_file(tmp_path / "plain/adapter_model.safetensors")
    stem = f"base_model.model.{layer.name}"
    cut = written[f"{stem}.lora_B.weight"] @ written[f"{stem}.lora_A.weight"]
    assert float((cut - delta).norm() / delta.norm()) == pytest.approx(layer.update_error, rel=1e-4)


@pytest.mark.parametrize("name", ROUTED)
def test_a_routed_adapter_is_refused_without_calibration(name, tiny_llama, tmp_path):
    with pytest.raises(ExportError, match=r"Give calibration examples: --calibration FILE\.jsonl"):
        multiflora.to_lora(adapted(name, tiny_llama()), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", EXACT + BY_TASK)
def test_an_exact_method_refuses_what_would_do_nothing(name, tiny_llama, tmp_path):
    with pytest.raises(ExportError, match="converts exactly; leave calibration out"):
        multiflora.to_lora(adapted(name, tiny_llama()), tmp_path / "plain", calibration=ROWS)


@pytest.mark.parametrize(("name", "settings"), [(name, {}) for name in ROUTED] + [("parts", w) for w in BETWEEN])
def test_reported_errors_are_those_of_the_layers(name, settings, tiny_llama, tmp_path):
    """The closed-form error from the moments against the error that running both models shows."""
    model = adapted(name, tiny_llama(), **settings)
    # fewer than four rows: the error is measured on the rows the gates come from
    rows = ROWS[:3]
    report = multiflora.to_lora(model, tmp_path / "plain", calibration=rows)
    assert not report.exact
    written = load_file(tmp_path / "plain/adapter_model.safetensors")
    for layer in report.adapters[0].layers[::5]:
        stem = f"base_model.model.{layer.name}"
        module = model.get_submodule(stem)
        seen = []
        with torch.no_grad():
            with_hook = module.register_forward_hook(lambda m, x, y, seen=seen: seen.append((x[0][0], y[0])))
            for row in rows:
                model(torch.tensor([row["input_ids"]]))
            with_hook.remove()
            x, y = (torch.cat(part) for part in zip(*seen, strict=True))
            update = y - module.base_layer(x)
            plain = x @ written[f"{stem}.lora_A.weight"].t() @ written[f"{stem}.lora_B.weight"].t()
        off = (update - plain).norm()
        assert layer.update_error == pytest.approx(float(off / update.norm()), rel=1e-3)
        assert layer.output_error == pytest.approx(float(off / y.norm()), rel=1e-3)
        assert layer.update_error > 1e-4


@pytest.mark.parametrize("name", ROUTED)
def test_a_fit_is_closer_than_the_mean_gate_and_its_logits_too(name, tiny_llama, tmp_path):
    # an update as small as a trained one, so that a layer's error does not change what the next one reads
    model = adapted(name, tiny_llama(), lora_alpha=1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("router.default"):
            parameter.data.mul_(20)  # a gate that really depends on the input
    ids = torch.tensor([row["input_ids"][:9] for row in ROWS])
    with torch.no_grad():
        wanted, errors, distances = model(ids).logits, {}, {}
    for fit in (False, True):
        folder = tmp_path / f"fit-{fit}"
        errors[fit] = multiflora.to_lora(model, folder, calibration=ROWS, fit=fit).adapters[0].mean("update_error")
        plain = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
        with torch.no_grad():
            distances[fit] = float((plain(ids).logits - wanted).norm())
    assert errors[True] < errors[False]
    assert distances[True] < distances[False]


@pytest.mark.parametrize(("name", "settings"), [("rlora", {}), *(("parts", w) for w in BETWEEN if "top_k" not in w)])
def test_a_gate_that_reads_nothing_from_its_input_converts_without_error(name, settings, tiny_llama, tmp_path):
    """With routers at zero the mean gate is the gate: the approximation is exact, and says so."""
    model = adapted(name, tiny_llama(), **settings)
    for tensor, parameter in model.named_parameters():
        if tensor.endswith("router.default"):
            parameter.data.zero_()
    report = multiflora.to_lora(model, tmp_path / "plain", calibration=ROWS)
    assert report.adapters[0].worst().update_error < 1e-5
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain")).eval()
    assert (logits_of(plain) - logits_of(model)).abs().max() < 1e-5


def test_routed_by_token_and_by_task_is_refused_in_a_sentence(tiny_llama, tmp_path):
    model = adapted("parts", tiny_llama(), task_matrix="full")
    with pytest.raises(ExportError, match=r"routed by token and depends on the task, too.*`multiflora serve`"):
        multiflora.to_lora(model, tmp_path / "plain", calibration=ROWS)


def test_one_adapter_for_each_task_from_a_folder_and_a_file(tiny_llama, tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    model = adapted("hydralora", AutoModelForCausalLM.from_pretrained(base))
    folder = save(model, tmp_path / "ours")
    whole = multiflora.to_lora(folder, tmp_path / "each", calibration=ROWS, per_task=True, tokenizer="none")
    assert [adapter.task for adapter in whole.adapters] == [TASKS[1], TASKS[0]] or [
        adapter.task for adapter in whole.adapters
    ] == TASKS
    one = multiflora.to_lora(model, tmp_path / "one", calibration=ROWS, task=TASKS[0])
    each = load_file(tmp_path / "each" / TASKS[0] / "adapter_model.safetensors")
    alone = load_file(tmp_path / "one/adapter_model.safetensors")
    assert one.adapters[0].task == TASKS[0]
    assert all(torch.allclose(each[key], alone[key], atol=1e-6) for key in each)
    with pytest.raises(ExportError, match="No calibration example is of task 'other'"):
        multiflora.to_lora(model, tmp_path / "two", calibration=ROWS, task="other")


def test_fit_and_rank_together_lose_less_of_the_output_than_the_plain_cut(tiny_llama, tmp_path):
    model = adapted("loramoe", tiny_llama())
    fitted = multiflora.to_lora(model, tmp_path / "fit", calibration=ROWS, fit=True, rank=2)
    plain = multiflora.to_lora(model, tmp_path / "mean", calibration=ROWS, rank=2)
    assert fitted.adapters[0].rank == plain.adapters[0].rank == 2
    assert fitted.adapters[0].mean("update_error") < plain.adapters[0].mean("update_error")


@pytest.mark.parametrize("name", OURS)
def test_a_missing_empty_or_cut_off_shard_is_an_error_that_names_file_and_tensor(name, tiny_llama, tmp_path):
    folder = save(adapted(name, tiny_llama()), tmp_path / "ours")
    words = {"calibration": ROWS, "base": "unused", "tokenizer": "none"} if name in ROUTED else {}
    file = folder / "adapter_model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    key = f"base_model.model.model.layers.1.mlp.up_proj.mf_{name}_B"
    if name not in ROUTED:
        save_file({k: v for k, v in weights.items() if k != key}, file)
        with pytest.raises(ExportError, match=rf"adapter_model\.safetensors: tensor {key} is missing"):
            multiflora.to_lora(folder, tmp_path / "plain", **words)
        save_file(weights | {key: weights[key][:0]}, file)
        with pytest.raises(ExportError, match=rf"tensor {key} is empty"):
            multiflora.to_lora(folder, tmp_path / "plain", **words)
        save_file(weights | {key: weights[key][:, :-1].contiguous()}, file)
        with pytest.raises(ExportError, match=rf"tensor {key} has shape .* only a shard was saved"):
            multiflora.to_lora(folder, tmp_path / "plain", **words)
    file.write_bytes(whole[:-100])
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors cannot be read .* cut off or damaged"):
        multiflora.to_lora(folder, tmp_path / "plain", **words)
    assert not (tmp_path / "plain").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"], "nothing half-written is left"


def test_an_output_folder_that_holds_something_is_left_alone(tiny_llama, tmp_path):
    folder = save(adapted("mlora", tiny_llama()), tmp_path / "ours")
    before = (folder / "adapter_config.json").read_text()
    with pytest.raises(ExportError, match="exists and is not empty; nothing was changed"):
        multiflora.to_lora(folder, folder)
    assert (folder / "adapter_config.json").read_text() == before


def test_nan_in_an_adapter_is_found_before_anything_is_written(tiny_llama, tmp_path):
    model = adapted("mlora", tiny_llama())
    model.base_model.model.model.layers[0].mlp.up_proj.mf_mlora_B["default"].data[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"tensor .*layers\.0\.mlp\.up_proj\.mf_mlora_B holds NaN or infinity"):
        multiflora.to_lora(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_report_is_on_disk_and_does_not_name_its_place(tiny_llama, tmp_path):
    multiflora.to_lora(adapted("mlora", tiny_llama()), tmp_path / "plain")
    report = json.loads((tmp_path / "plain/report.json").read_text())
    assert report["how"] == "exact"
    assert len(report["adapters"][0]["layers"]) == 14
    assert str(tmp_path) not in json.dumps(report)
