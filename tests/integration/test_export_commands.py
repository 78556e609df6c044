"""The commands do what the functions do, and their errors are one paragraph."""

from __future__ import annotations

import json

import pytest
import typer.testing
import yaml
from made_adapters import TASKS, adapted, save
from test_export_dense import base_folder

from multiflora.cli import app
from multiflora.methods import build_config


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *words: typer.testing.CliRunner().invoke(app, [str(word) for word in words])


def test_convert_merge_expand_and_compose_from_the_command_line(run, tiny_llama, tmp_path):
    base = base_folder(tiny_llama(), tmp_path / "base")
    save(adapted("mlora", base), tmp_path / "ours")
    done = run("convert", tmp_path / "ours", "--layers")
    assert done.exit_code == 0, done.output
    assert "model.layers.1.mlp.down_proj" in done.output
    assert (tmp_path / "ours-lora/adapter_model.safetensors").is_file()
    done = run("convert", tmp_path / "ours", "--rank", 2, "-o", tmp_path / "small", "--json")
    assert [layer["rank"] for layer in json.loads(done.stdout)["adapters"][0]["layers"]] == [2] * 14
    assert run("convert", tmp_path / "ours", "--to", "gguf-lora").exit_code == 0
    assert (tmp_path / "ours-gguf-lora/adapter.gguf").is_file()
    assert run("merge", tmp_path / "ours", "-o", tmp_path / "dense").exit_code == 0
    assert (tmp_path / "dense/model.safetensors").is_file()
    assert run("expand", tmp_path / "small", "--method", "rlora", "--set", "head_dropout=0.1").exit_code == 0
    assert json.loads((tmp_path / "small-rlora/adapter_config.json").read_text())["head_dropout"] == 0.1
    done = run(
        "compose", tmp_path / "ours", tmp_path / "small", "--weights", "1,-0.5", "-o", tmp_path / "sum", "--json"
    )
    assert list(json.loads(done.stdout)["weights"].values()) == [1.0, -0.5]
    done = run("compose", tmp_path / "ours", tmp_path / "small", "--route", "-o", tmp_path / "routed")
    section = yaml.safe_load(done.stdout.partition("by a recipe with:")[2].partition("Written to")[0])
    assert section["init_from"] == str(tmp_path / "routed")
    assert build_config(section["method"].pop("name"), section["method"]).frozen == ["A", "B"]


def test_convert_tells_how_one_llama_server_has_all_tasks(run, tiny_llama, tmp_path):
    base = base_folder(tiny_llama(), tmp_path / "base")
    save(adapted("moelora", base, num_experts=2), tmp_path / "ours")
    done = run("convert", tmp_path / "ours", "--to", "gguf-lora")
    assert done.exit_code == 0, done.output
    loads = " ".join(f"--lora-scaled {task}.gguf:0" for task in TASKS)
    assert f"started in {tmp_path}/ours-gguf-lora: llama-server -m BASE.gguf {loads}\n" in done.stdout
    assert f'A request for {TASKS[1]} says: "lora": [{{"id": 1, "scale": 1.0}}]\n' in done.stdout
    done = run("convert", tmp_path / "ours", "--to", "gguf-lora", "--per-expert", "-o", tmp_path / "experts")
    told = json.loads((tmp_path / "experts/llama-server.json").read_text())
    for task in TASKS:
        assert f'A request for {task} says: "lora": {json.dumps(told["lora"][task])}\n' in done.stdout
    assert sum(adapter["scale"] for adapter in told["lora"][TASKS[0]]) == pytest.approx(1)


def test_calibration_comes_from_a_file_of_rows(run, tiny_llama, tmp_path):
    base = base_folder(tiny_llama(), tmp_path / "base")
    save(adapted("rlora", base), tmp_path / "ours")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": " w5 w6", "task": TASKS[i % 2]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("convert", tmp_path / "ours", "--calibration", tmp_path / "rows.jsonl", "--fit", "--per-task", "--json")
    done = run(*words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["how"] == "fit"
    assert sorted(adapter["folder"] for adapter in told["adapters"]) == sorted(TASKS)
    assert all(0 < layer["update_error"] < 1 for layer in told["adapters"][0]["layers"])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1"}\n{"prompt": \n')
    done = run(*words, "-o", tmp_path / "other")
    assert done.exit_code == 2
    assert "rows.jsonl, line 2: not valid JSON" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "OURS"], "Give calibration examples: --calibration FILE.jsonl"),
        (["convert", "nowhere"], "nowhere does not exist. Give the folder an adapter was saved to"),
        (["convert", "OURS", "--to", "dense", "--score"], "--score compares plain LoRA"),
        (["convert", "OURS", "--per-expert", "--score"], "--score scores adapters one by one"),
        (["convert", "OURS", "--per-expert"], "weighs its heads for each token anew"),
        (["merge", "OURS"], "Give calibration examples"),
        (["expand", "OURS"], "holds an adapter of kind MF_RLORA; expected a plain LoRA"),
        (["compose", "OURS", "-o", "out"], "There is 1 adapter to compose"),
        (["compose", "OURS", "OURS", "-o", "out", "--weights", "1,x"], "--weights is '1,x'"),
        (["compose", "OURS", "OURS", "-o", "out", "--weights", "1,2", "--route"], "route and weights are both given"),
        (["serve", "OURS", "a=OURS", "a=OURS"], "Two adapters are called 'a'"),
    ],
)
def test_errors_are_one_paragraph(words, message, run, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(adapted("rlora", tiny_llama()), tmp_path / "ours")
    done = run(*[word.replace("OURS", str(tmp_path / "ours")) for word in words])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
