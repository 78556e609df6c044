"""Where the log goes besides the screen: the trackers that transformers knows, asked for before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.suggest import did_you_mean

__all__ = ["require_trackers"]


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that does not exist, or whose package is missing.

    Args:
        names: What a recipe says in ``train.report_to``.
    Raises:
        ConfigError: transformers knows no such tracker.
        EnvironmentProblem: Its package is not installed.
    Example:
        >>> require_trackers([])
    """
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name != "all" and name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to names {name!r}, which transformers does not know; "
                f"{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
            )
    missing = sorted(set(names) - {"all", "flyte"} - set(get_available_reporting_integrations()))
    if missing:
        raise EnvironmentProblem(
            f"train.report_to names {missing[0]}, whose package is not installed: pip install "
            f"{missing[0].replace('_', '-')}. Or take it out of train.report_to."
        )
