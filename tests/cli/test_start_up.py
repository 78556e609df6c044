"""Commands that need no model answer at once: they import no torch, whose import alone takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "lm_eval", "pandas", "scipy", "sklearn"}

PROBE = """
import sys
from multiflora.cli import main
sys.argv = ["multiflora", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("EXIT", end.code or 0)
print("HEAVY", *sorted({%r} & {name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["tasks"], 0),
        (["methods"], 0),
        (["methods", "show", "rlora"], 0),
        (["init", "new.yaml"], 0),
        (["train", "absent.yaml"], 2),
        (["train", "refused.yaml"], 2),
        (["tasks", "show", "absent"], 2),
    ],
    ids=str,
)
def test_no_torch_is_imported(words: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "refused.yaml").write_text("model: embedded\nmethd: rlora\n", "utf-8")
    probe = PROBE.replace("{%r}", repr(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", probe, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    exit_line, heavy_line = done.stdout.splitlines()[-2:]
    assert exit_line == f"EXIT {code}", done.stderr
    assert heavy_line == "HEAVY"


@pytest.mark.parametrize("name", ["RLoraConfig", "MultiLoraConfig", "task", "to_lora"])
def test_a_script_may_import_one_of_our_names_first(name: str) -> None:
    script = f"from multiflora import {name}; import peft; print('MF_RLORA' in peft.PeftType.__members__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("name", ["multiflora.methods.rlora", "multiflora.methods.config", "multiflora.peft_bridge"])
def test_a_deep_module_before_peft_says_what_to_import_first(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
    assert f"ImportError: {name} was imported before peft" in done.stderr
    assert "Import peft first" in done.stderr
    done = subprocess.run([sys.executable, "-c", f"import peft, {name}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# what `pip install multiflora` alone does not bring; the modules that are nothing without one of them import it at once
OPTIONAL = {
    "deepspeed", "fastapi", "gguf", "liger_kernel", "matplotlib", "nevergrad", "ray", "submitit",
    "tensorboard", "triton", "uvicorn",
}  # fmt: skip
NEEDS_ITS_PACKAGE = {"multiflora.serve.app"}

WALK = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import multiflora
for module in pkgutil.walk_packages(multiflora.__path__, "multiflora."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    except ImportError:
        print(module.name)
"""


def test_all_modules_import_without_the_optional_packages() -> None:
    done = subprocess.run([sys.executable, "-c", WALK, *OPTIONAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == NEEDS_ITS_PACKAGE
