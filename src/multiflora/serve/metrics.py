"""What the server has done so far, as Prometheus reads it, under the names of vLLM's server with our own in front."""

from __future__ import annotations

from collections import Counter
from threading import Lock

__all__ = ["Metrics"]

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Metrics:
    """Counters; the computing thread writes them, a request reads them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._finished: Counter[str] = Counter()
        self._prompt = self._written = 0
        self._first: list[int] = [0] * (len(_BOUNDS) + 1)
        self._first_sum = 0.0

    def first(self, seconds: float, prompt: int) -> None:
        """An answer has its first token, so many seconds after its request came."""
        with self._lock:
            self._prompt += prompt
            self._first_sum += seconds
            self._first[next((k for k, bound in enumerate(_BOUNDS) if seconds <= bound), len(_BOUNDS))] += 1

    def token(self) -> None:
        """A token was written."""
        with self._lock:
            self._written += 1

    def finished(self, finish: str) -> None:
        """An answer has ended."""
        with self._lock:
            self._finished[finish] += 1

    def text(self, *, running: int, waiting: int) -> str:
        """All of it in Prometheus' text format, version 0.0.4."""
        with self._lock:
            parts = [
                _one("num_requests_running", "gauge", "Answers that are being written.", running),
                _one("num_requests_waiting", "gauge", "Answers that wait for room.", waiting),
                _one("prompt_tokens_total", "counter", "Tokens read.", self._prompt),
                _one("generation_tokens_total", "counter", "Tokens written.", self._written),
                _head("request_success_total", "counter", "Answers by the way they ended."),
                *(
                    f'multiflora:request_success_total{{finished_reason="{why}"}} {self._finished[why]}\n'
                    for why in ("stop", "length", "cancelled", "failed")
                ),
                _head("time_to_first_token_seconds", "histogram", "From a request to its first token."),
            ]
            name, total = "multiflora:time_to_first_token_seconds", 0
            for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._first, strict=True):
                total += count
                parts.append(f'{name}_bucket{{le="{bound}"}} {total}\n')
            parts.append(f"{name}_sum {self._first_sum}\n{name}_count {total}\n")
        return "".join(parts)


def _head(name: str, kind: str, what: str) -> str:
    return f"# HELP multiflora:{name} {what}\n# TYPE multiflora:{name} {kind}\n"


def _one(name: str, kind: str, what: str, value: float) -> str:
    return f"{_head(name, kind, what)}multiflora:{name} {value}\n"
