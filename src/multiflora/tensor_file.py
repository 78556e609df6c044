"""A safetensors file that is read with care: every fault names the file and the tensor, and nothing is read unasked."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from multiflora.errors import AdapterError, MultifloraError

__all__ = ["TensorFile"]


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
