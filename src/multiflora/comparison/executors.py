"""Cells on a cluster: one Slurm job each through submitit, or one Ray task each. The output folder is shared by all."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multiflora.errors import EnvironmentProblem

__all__ = ["on_ray", "on_slurm"]

Work = Callable[[Any, Path], Any]


def on_slurm(
    work: Work, cells: Sequence[Any], folder: Path, *, at_once: int | None, resources: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Hand every cell in as a job, and yield each with its result, or with the error that ended it.

    Args:
        work: Called with a cell and the folder, on some machine; importable there.
        cells: What it is called with.
        folder: The comparison's output folder; the jobs' own logs go to ``jobs`` in it.
        at_once: Most jobs at a time; None: as Slurm likes.
        resources: submitit's parameters, such as ``timeout_min``, ``gpus_per_node`` and ``slurm_partition``;
            ``cluster: local`` runs the jobs as processes of this machine, to try it out.
    Raises:
        EnvironmentProblem: submitit is not installed.
    """
    submitit = _needed("submitit", "slurm")
    given = dict(resources)
    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=given.pop("cluster", "slurm"))
    limit = {} if at_once is None or executor.cluster != "slurm" else {"slurm_array_parallelism": at_once}
    executor.update_parameters(name="multiflora", **limit, **given)
    with executor.batch():  # one array of jobs
        jobs = [executor.submit(work, cell, folder) for cell in cells]
    of_job = {job.job_id: cell for job, cell in zip(jobs, cells, strict=True)}
    for job in submitit.helpers.as_completed(jobs):
        error = job.exception()
        yield of_job[job.job_id], job.result() if error is None else error


def on_ray(
    work: Work, cells: Sequence[Any], folder: Path, *, at_once: int | None, resources: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Run every cell as a task of a Ray cluster, and yield each with its result, or with the error that ended it.

    Args:
        work: Called with a cell and the folder, on some machine; importable there.
        cells: What it is called with.
        folder: The comparison's output folder.
        at_once: Most tasks at a time; None: as many as the cluster has room for.
        resources: Options of a task, such as ``num_gpus`` and ``num_cpus``. The cluster is that of RAY_ADDRESS.
    Raises:
        EnvironmentProblem: Ray is not installed.
    """
    ray = _needed("ray", "ray")
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    task = ray.remote(work).options(**resources)
    waiting = list(cells)
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < (at_once or len(cells)):
            cell = waiting.pop(0)
            running[task.remote(cell, folder)] = cell
        [done], _ = ray.wait(list(running), num_returns=1)
        cell = running.pop(done)
        try:
            yield cell, ray.get(done)
        except ray.exceptions.RayError as error:
            yield cell, error


def _needed(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EnvironmentProblem(
            f"compare.executor is {extra!r}, which needs the package {package}, and it is not installed: "
            f"pip install 'multiflora[{extra}]'. Or set compare.executor to 'local'."
        ) from error
