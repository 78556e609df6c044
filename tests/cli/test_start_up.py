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


# each name is the first import of a process of its own, forked where all that peft itself imports is there already,
# and of peft nothing
DEEP = """
import importlib.util, multiprocessing, pathlib, pkgutil, sys, torch, transformers, transformers.integrations.peft, peft
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]

def first(name):
    module, _, attribute = name.partition(":")
    importlib.import_module(module)
    if attribute:
        getattr(sys.modules[module], attribute)
    import peft
    configs = {config.__name__ for config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    cards = importlib.import_module("multiflora.methods").METHODS.values()
    assert {card.config for card in cards if card.module} <= configs

methods = pathlib.Path(importlib.util.find_spec("multiflora").origin).parent / "methods"
names = ["multiflora.peft_bridge", "multiflora.adapter_tensors", "multiflora.training.adapter"]
names += [f"multiflora.methods.{module.name}" for module in pkgutil.iter_modules([str(methods)])]
names += [f"multiflora:{name}" for name in ("RLoraConfig", "MultiLoraConfig", "task", "to_lora")]
for name in names:
    child = multiprocessing.get_context("fork").Process(target=first, args=(name,))
    child.start()
    child.join()
    print(name, child.exitcode)
"""


def test_any_deep_module_and_any_of_our_names_may_be_the_first_import() -> None:
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, check=False)
    said = dict(line.split() for line in done.stdout.splitlines())
    assert len(said) > 20, done.stderr
    assert set(said.values()) == {"0"}, (said, done.stderr)


def test_the_first_line_of_a_script() -> None:
    script = "from multiflora.methods.rlora import RLoraConfig; import peft; print(RLoraConfig().peft_type.value)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MF_RLORA", done.stderr


# what `pip install multiflora` alone does not bring; the modules that are nothing without one of them import it at once
OPTIONAL = {
    "axolotl", "deepspeed", "fastapi", "gguf", "liger_kernel", "matplotlib", "nevergrad", "ray", "submitit",
    "tensorboard", "triton", "uvicorn", "vllm",
}  # fmt: skip
NEEDS_ITS_PACKAGE = {
    "multiflora.integrations.axolotl", "multiflora.integrations.vllm.branches", "multiflora.integrations.vllm.model",
    "multiflora.integrations.vllm.many", "multiflora.serve.app",
}  # fmt: skip

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
