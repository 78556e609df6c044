r"""Methods with a token router become a plain LoRA approximately: the gate's mean, or a fit, with the error known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from multiflora.errors import ExportError
from multiflora.export.calibrate import Observed
from multiflora.export.fit import averaged, coefficients, fitted
from multiflora.export.low_rank import truncate, truncate_for
from multiflora.export.moments import relative_error, routed_coefficients
from multiflora.export.plain import Pair
from multiflora.export.report import LayerReport
from multiflora.export.saved import SavedAdapter

__all__ = ["routed_pairs"]


def routed_pairs(
    adapter: SavedAdapter, observed: Mapping[str, Observed], *, fit: bool, rank: int | None
) -> Iterator[tuple[Pair, LayerReport]]:
    """Every layer's replacement, and how far it is off on the examples that were held out.

    Args:
        adapter: Of a method with a token router.
        observed: What each layer did on the calibration examples.
        fit: Minimise the error of the layer's output; otherwise each head gets its mean gate.
        rank: Cut to this rank; None keeps the stems' own.

    Raises:
        ExportError: A layer was never run, e.g. as its block was skipped.
    """
    method = adapter.method
    for layer in adapter.layers():
        if layer.name not in observed:
            raise ExportError(
                f"{layer.name} was not reached by any calibration example, so its gate is unknown. Give examples that "
                "pass through the whole model."
            )
        seen = observed[layer.name]
        A, B = (fitted if fit else averaged)(method, layer.config, layer.parts, layer.scale, seen.fit)
        stems, lost = A, 0.0
        if rank is not None and rank < A.shape[0]:
            if fit:
                gram = seen.fit.second[-A.shape[0] :, -A.shape[0] :] / seen.fit.tokens
                A, B, lost = truncate_for(A, B, rank, gram)
            else:
                A, B, lost = truncate(A, B, rank)
        wanted = routed_coefficients(method, layer.config, layer.parts, layer.scale)
        got = coefficients(A, B, stems, wanted.shape[1])
        update_error, output_error = relative_error(wanted, got, seen.test)
        yield (
            Pair(layer.name, A, B),
            LayerReport(layer.name, A.shape[0], update_error, output_error, lost),
        )
