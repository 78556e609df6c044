"""Every example config is one that accelerate's own launcher understands in full."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
ENGINES = {
    "ddp": (DistributedType.MULTI_GPU, {}),
    "fsdp2": (DistributedType.FSDP, {"fsdp_version": 2}),
    "fsdp1": (DistributedType.FSDP, {"fsdp_version": 1, "fsdp_use_orig_params": True}),
    "zero2": (DistributedType.DEEPSPEED, {"zero_stage": 2}),
    "zero3": (DistributedType.DEEPSPEED, {"zero_stage": 3}),
}


def test_there_is_one_for_every_engine_on_one_machine_and_on_four() -> None:
    expected = {f"{engine}_{size}.yaml" for engine in ENGINES for size in ("8gpu", "4x8gpu")}
    assert {path.name for path in FOLDER.iterdir()} == expected


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("size", "machines"), [("8gpu", 1), ("4x8gpu", 4)])
def test_accelerate_reads_it(engine: str, size: str, machines: int) -> None:
    config = load_config_from_file(str(FOLDER / f"{engine}_{size}.yaml"))
    kind, settings = ENGINES[engine]
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    own = {**config.fsdp_config, **config.deepspeed_config}
    assert settings.items() <= own.items()
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert own.keys() <= options.keys()  # no key that the launcher would pass over


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_its_own_command_names_it(path: Path) -> None:
    assert f"--config_file configs/accelerate/{path.name} -m multiflora train" in path.read_text()
