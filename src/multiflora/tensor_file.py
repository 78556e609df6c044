"""Safetensors files, read and written with care: every fault names the file and the tensor.

Nothing is read unasked. A file is written beside its place, read back, compared bit for bit and only then moved there.
So a name never holds half a file, and an empty shard, as saving under sharded training has produced elsewhere without a
word, is an error.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multiflora.errors import AdapterError, ExportError, MultifloraError
from multiflora.files import saving

__all__ = ["TensorFile", "check_same", "check_shards", "write_tensors"]


class TensorFile:
    """A safetensors file, open for reading one tensor at a time; nothing is held in memory.

    The header is checked by safetensors itself: what it promises must be what the file's bytes can hold.

    Args:
        path: The file.
        error: The kind of error to raise.

    Raises:
        MultifloraError: Of that kind: the file is missing, or cut off, or no safetensors file.

    Example:
        >>> with TensorFile(Path("run/adapter_model.safetensors")) as file:  # doctest: +SKIP
        ...     first = file[file.names[0]]
    """

    def __init__(self, path: Path, error: type[MultifloraError] = AdapterError) -> None:
        self.path = path
        self._error = error
        if not path.is_file():
            raise error(f"{path} is missing; expected a safetensors file there. Save the adapter or model again.")
        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as fault:
            raise error(
                f"{path} cannot be read ({fault}); it is cut off or damaged ({path.stat().st_size:,} bytes). "
                "Copy or save it again."
            ) from fault
        held: Any = self._file
        self.names: list[str] = sorted(held.keys())

    def __enter__(self) -> TensorFile:
        """Open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.__exit__(kind, error, trace)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's type in safetensors' words (``F32``, ``BF16``, ``I64``, ...), without reading it."""
        return str(self._file.get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            MultifloraError: It is not there, or holds nothing: a shard was saved instead of the whole.
        """
        if name not in self.names:
            raise self._error(f"{self.path} has no tensor {name}; it is incomplete. Save the adapter or model again.")
        if 0 in self.shape(name):
            raise self._error(
                f"{self.path}: tensor {name} is empty (shape {self.shape(name)}); a shard was saved instead of the "
                "whole. Save again from a process that holds all weights."
            )
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, read it back, and put it in place only if it holds every tensor bit for bit.

    Args:
        path: Where the file goes; an old file is unchanged until the new one is proven.
        tensors: By name.
        metadata: Goes into the file's header.

    Raises:
        ExportError: A tensor is empty or not finite, or what was read back differs.
        EnvironmentProblem: The system refuses, e.g. as no space is left.
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ExportError(f"Tensor {name} is empty (shape {tuple(tensor.shape)}); {path} was not written.")
        # NaN passes through minimum and maximum; this reads a tensor once and makes no copy
        if tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax())):
            raise ExportError(
                f"Tensor {name} holds NaN or infinity; {path} was not written. The adapter was broken in training, or "
                "its numbers do not fit the dtype."
            )
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            _save(whole, Path(scratch), {"format": "pt", **(metadata or {})})
            check_same(Path(scratch), whole, shown_as=path)
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write, and let a full disk be the OSError it is: safetensors says its number in words only."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), str(error)) from error
    with path.open("rb") as stream:
        os.fsync(stream.fileno())  # a full disk may only be told of here


def check_same(path: Path, tensors: Mapping[str, Tensor], shown_as: Path | None = None) -> None:
    """Compare a file with what it should hold, bit for bit.

    Args:
        path: The file.
        tensors: What it should hold, by name.
        shown_as: The file's name in messages, where ``path`` is temporary.

    Raises:
        ExportError: A tensor is missing, too many, or differs.
    """
    shown = shown_as or path
    with TensorFile(path, ExportError) as file:
        strange = sorted(set(file.names) ^ set(tensors))
        if strange:
            raise ExportError(
                f"{shown} was read back and is not what was written: {len(strange)} tensors are missing or too many "
                f"(first: {strange[0]}). Save again, on another disk if it recurs."
            )
        for name, tensor in tensors.items():
            found = file[name]
            # NaN differs from itself, so bits are compared and not numbers
            if found.dtype != tensor.dtype or found.shape != tensor.shape or not _same_bits(found, tensor):
                raise ExportError(
                    f"{shown} was read back and tensor {name} is not what was written. Save again, on another disk if "
                    "it recurs."
                )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.detach().to("cpu").contiguous()
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def check_shards(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Compare a saved model, in one file or in shards, with the weights in memory.

    Args:
        folder: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards it names.
        tensors: The weights by name; names that share memory (tied weights) may be saved once.

    Returns:
        The files.

    Raises:
        ExportError: A shard is missing, cut off or empty, or a tensor is missing or differs.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    else:
        files = ["model.safetensors"]
    left = dict(tensors)
    for name in files:
        with TensorFile(folder / name, ExportError) as file:
            if not file.names:
                raise ExportError(f"{folder / name} holds no tensor at all; the model was not saved. Save it again.")
            for key in file.names:
                expected = left.pop(key, None)
                if expected is None:
                    raise ExportError(f"{folder / name} holds {key}, which the model does not have. Save it again.")
                if not _same_bits(file[key], expected):
                    raise ExportError(f"{folder / name}: tensor {key} is not what was written. Save it again.")
    saved = {tensors[key].data_ptr() for key in tensors.keys() - left.keys()}
    lost = sorted(key for key, tensor in left.items() if tensor.data_ptr() not in saved)
    if lost:
        raise ExportError(
            f"{folder} lacks {len(lost)} of {len(tensors)} tensors of the model (first: {lost[0]}). Save it again."
        )
    return [folder / name for name in files]
