"""Files are proven before they are put in place; every fault names file and tensor."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from multiflora import ExportError
from multiflora.tensor_file import TensorFile, check_same, check_shards, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.full((4,), -0.0, dtype=torch.bfloat16), "c": torch.tensor(3)}


def test_what_is_written_is_what_is_read(tmp_path):
    file = tmp_path / "sub/adapter.safetensors"
    write_tensors(file, TENSORS, {"rank": "4"})
    check_same(file, TENSORS)
    with TensorFile(file) as opened:
        assert opened.names == ["a", "b", "c"]
        assert opened.shape("a") == (2, 3)
        assert torch.equal(opened["a"], TENSORS["a"])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": TENSORS["a"] + 1e-7}, "tensor a is not what was written"),
        ({"b": torch.full((4,), 0.0, dtype=torch.bfloat16)}, "tensor b is not what was written"),
        ({"c": torch.tensor(3, dtype=torch.int32)}, "tensor c is not what was written"),
        ({"d": torch.ones(1)}, r"1 tensors are missing or too many \(first: d\)"),
    ],
    ids=["a value", "a sign of zero", "a dtype", "one too many"],
)
def test_a_difference_of_one_bit_is_found(changed, message, tmp_path):
    file = tmp_path / "adapter.safetensors"
    save_file(TENSORS | changed, file)
    with pytest.raises(ExportError, match=message):
        check_same(file, TENSORS)


def test_a_bad_tensor_leaves_the_old_file_as_it_was(tmp_path):
    file = tmp_path / "adapter.safetensors"
    write_tensors(file, TENSORS)
    for bad, message in (
        (torch.tensor([1.0, float("nan")]), "Tensor a holds NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), "Tensor a holds NaN or infinity"),
        (torch.empty(0, 3), r"Tensor a is empty \(shape \(0, 3\)\)"),
    ):
        with pytest.raises(ExportError, match=message):
            write_tensors(file, TENSORS | {"a": bad})
    check_same(file, TENSORS)


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path):
    """A limit on the size of files stands for the full disk: the system refuses the write in the same way."""
    script = (
        "import resource, sys, torch, pathlib\n"
        "from multiflora.tensor_file import write_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "write_tensors(pathlib.Path(sys.argv[1]), {'a': torch.ones(10000)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "adapter.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "EnvironmentProblem: No space left to write" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_shards_are_compared_with_the_model(tmp_path):
    tied = torch.ones(3)
    weights = {"x": torch.arange(4.0), "y": tied, "y_again": tied}
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": weights["x"]}, tmp_path / "model-1.safetensors")
    with pytest.raises(ExportError, match=r"model-2\.safetensors is missing"):
        check_shards(tmp_path, weights)
    save_file({}, tmp_path / "model-2.safetensors")
    with pytest.raises(ExportError, match=r"model-2\.safetensors holds no tensor at all"):
        check_shards(tmp_path, weights)
    save_file({"z": tied}, tmp_path / "model-2.safetensors")
    with pytest.raises(ExportError, match=r"model-2\.safetensors holds z, which the model does not have"):
        check_shards(tmp_path, weights)
    save_file({"y": tied + 1}, tmp_path / "model-2.safetensors")
    with pytest.raises(ExportError, match=r"model-2\.safetensors: tensor y is not what was written"):
        check_shards(tmp_path, weights)
    save_file({"y": tied}, tmp_path / "model-2.safetensors")
    assert len(check_shards(tmp_path, weights)) == 2
    with pytest.raises(ExportError, match=r"lacks 1 of 4 tensors of the model \(first: w\)"):
        check_shards(tmp_path, weights | {"w": torch.zeros(2)})
    (tmp_path / "model-2.safetensors").write_bytes((tmp_path / "model-2.safetensors").read_bytes()[:-2])
    with pytest.raises(ExportError, match=r"model-2\.safetensors cannot be read"):
        check_shards(tmp_path, weights)
