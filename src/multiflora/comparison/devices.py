"""Cells side by side: one process for each device, one after the other in this one, or jobs of a cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from multiflora.comparison.cell import run_cell
from multiflora.comparison.executors import on_ray, on_slurm
from multiflora.comparison.plan import Cell
from multiflora.comparison.spec import CompareSpec
from multiflora.errors import Interrupted, MultifloraError

__all__ = ["Failure", "device_count", "run_cells"]

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """Why a cell could not be finished; the others go on."""

    reason: str


def device_count(asked: int | None) -> int:
    """How many cells run at a time: as many as asked for, else one for each GPU, else one."""
    return asked or max(1, torch.cuda.device_count())


def run_cells(
    cells: Sequence[Cell], folder: Path, spec: CompareSpec
) -> Iterator[tuple[Cell, dict[str, Any] | Failure]]:
    """Run cells and yield each as it is finished.

    Args:
        cells: Those that have yet to run.
        folder: The comparison's output folder.
        spec: Says where they run and how many at a time. With one on this machine, they run in this process.
    """
    if spec.executor != "local" and cells:
        where = {"slurm": on_slurm, "ray": on_ray}[spec.executor]
        for cell, result in where(_attempt, cells, folder, at_once=spec.devices, resources=spec.resources):
            yield cell, Failure(f"{cell.name}: {result}") if isinstance(result, BaseException) else result
        return
    devices = device_count(spec.devices)
    if devices == 1 or len(cells) == 1:
        for cell in cells:
            yield cell, _attempt(cell, folder)
        return
    # fork would share a CUDA context and locks that other threads hold
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for number in range(devices):
        free.put(number)
    with ProcessPoolExecutor(devices, context, initializer=_take_device, initargs=(free, devices)) as pool:
        running: dict[Future[Any], Cell] = {pool.submit(_attempt, cell, folder): cell for cell in cells}
        for done in as_completed(running):
            yield running[done], done.result()


def _attempt(cell: Cell, folder: Path) -> dict[str, Any] | Failure:
    """Run a cell; what one cell alone cannot do must not stop a night of others."""
    try:
        return run_cell(cell, folder)
    except Interrupted:  # all of them are to stop
        raise
    except (MultifloraError, torch.OutOfMemoryError) as error:
        return Failure(f"{cell.name}: {error}")


def _take_device(free: Any, devices: int) -> None:
    """In a fresh process: take one GPU, or a share of the CPU's cores."""
    number = free.get()
    if torch.cuda.device_count() > 1:  # asked before CUDA starts, which then sees this one GPU only
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    elif not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices))
