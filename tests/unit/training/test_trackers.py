"""A tracker that is not there is refused before any work is done."""

from __future__ import annotations

import pytest
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.training.trackers import require_trackers

THERE = set(get_available_reporting_integrations())
MISSING = sorted(set(INTEGRATION_TO_CALLBACK) - THERE - {"flyte"})


def test_those_that_are_there() -> None:
    for names in ([], ["all"], ["flyte"], *([name] for name in THERE)):
        require_trackers(names)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"train\.report_to names 'wandd', .*did you mean wandb"):
        require_trackers(["all", "wandd"])


def test_a_package_that_is_not_installed() -> None:
    missing = MISSING[0]
    with pytest.raises(EnvironmentProblem, match=rf"names {missing}, .*pip install {missing.replace('_', '-')}\. Or"):
        require_trackers(["all", missing])
