"""What a conversion did, layer by layer: for people a table, for programs ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiflora.text_table import TextTable

__all__ = ["AdapterReport", "LayerReport", "Report", "TaskScores"]


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer."""

    name: str
    rank: int
    """Of the plain LoRA."""
    update_error: float
    """Root mean square of what the update lacks, relative to the update: on held-out calibration examples where the
    gate was averaged or fitted, over all directions where an exact update was cut to a smaller rank, else 0."""
    output_error: float | None
    """The same relative to the layer's whole output; None where no example was run."""
    energy_lost: float
    """Share of the squared singular values that a smaller rank left out, from 0 to 1."""


@dataclass(frozen=True)
class AdapterReport:
    """One plain LoRA that was written."""

    folder: str
    """Its folder within the output folder; empty for the output folder itself."""
    task: str | None
    """The task it is for; None: for all."""
    exact: bool
    """Whether it computes what the adapter computes, up to rounding."""
    layers: tuple[LayerReport, ...]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    def mean(self, name: str) -> float | None:
        """Mean over the layers of one of their numbers, or None where a layer has none."""
        values = [getattr(layer, name) for layer in self.layers]
        return None if None in values else sum(values) / len(values)

    def worst(self) -> LayerReport:
        """The layer whose update is farthest off."""
        return max(self.layers, key=lambda layer: layer.update_error)


@dataclass(frozen=True)
class TaskScores:
    """A task scored with the adapter, and with what it was converted to."""

    task: str
    metric: str
    n: int
    """Examples scored."""
    before: float
    after: float
    stderr: float | None
    """Standard error of ``before``."""
    nll_before: float | None
    """Nats per token of the right answer, where there are choices."""
    nll_after: float | None


@dataclass(frozen=True)
class Report:
    """A conversion: what was made, and how far it is from the adapter."""

    method: str
    how: str
    """``exact``, ``mean gate`` or ``fit``."""
    output: Path
    adapters: tuple[AdapterReport, ...]
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Where a task is a sum of the adapters: its scale of each, by the task's name."""
    scores: tuple[TaskScores, ...] = ()
    """Tasks before and after, where they were scored."""

    @property
    def exact(self) -> bool:
        """Whether everything written computes what the adapter computes."""
        return all(adapter.exact for adapter in self.adapters)

    def folder(self, adapter: AdapterReport) -> Path:
        """Where an adapter lies."""
        return self.output / adapter.folder

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the place is left out, so that the folder can be moved."""
        told: dict[str, Any] = {"method": self.method, "how": self.how}
        told |= {"adapters": [asdict(adapter) for adapter in self.adapters]}
        told |= {"scales": {task: list(row) for task, row in self.scales.items()}} if self.scales else {}
        return told | ({"scores": [asdict(score) for score in self.scores]} if self.scores else {})

    def table(self) -> TextTable:
        """One line for each adapter written."""
        from multiflora.text_table import TextTable

        table = TextTable(
            "adapter", "task", "rank", "exact", "update error", "output error", "energy lost", "worst layer"
        )
        for adapter in self.adapters:
            worst = adapter.worst()
            table.add_row(
                adapter.folder or self.output.name,
                adapter.task or "all",
                str(adapter.rank),
                "yes" if adapter.exact else "no",
                _percent(adapter.mean("update_error")),
                _percent(adapter.mean("output_error")),
                _percent(adapter.mean("energy_lost")),
                "" if worst.update_error == 0 else f"{worst.name} ({_percent(worst.update_error)})",
            )
        return table

    def scale_table(self) -> TextTable:
        """One line for each task that is a sum of the adapters."""
        from multiflora.text_table import TextTable

        table = TextTable("scale for", *(adapter.folder for adapter in self.adapters))
        for task, row in self.scales.items():
            table.add_row(task, *(f"{scale:.4f}" for scale in row))
        return table

    def score_table(self) -> TextTable:
        """One line for each task scored."""
        from multiflora.text_table import TextTable

        table = TextTable("task", "metric", "n", "adapter", "converted", "change", "nll", "nll converted")
        for score in self.scores:
            error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
            nll = ["" if value is None else f"{value:.3f}" for value in (score.nll_before, score.nll_after)]
            numbers = f"{score.before:.3f}{error}", f"{score.after:.3f}", f"{score.after - score.before:+.3f}"
            table.add_row(score.task, score.metric, str(score.n), *numbers, *nll)
        return table

    def layer_table(self, adapter: AdapterReport) -> TextTable:
        """One line for each layer of an adapter."""
        from multiflora.text_table import TextTable

        table = TextTable("layer", "rank", "update error", "output error", "energy lost")
        for layer in adapter.layers:
            table.add_row(
                layer.name,
                str(layer.rank),
                _percent(layer.update_error),
                _percent(layer.output_error),
                _percent(layer.energy_lost),
            )
        return table


def _percent(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{100 * value:.3g} %"
