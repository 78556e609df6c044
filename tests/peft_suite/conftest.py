"""peft's own tests on our methods; started by ``make peft-suite``, which fetches the tests and sets the environment."""

import os
import sys
from pathlib import Path

SUITE = os.environ.get("MULTIFLORA_PEFT_SUITE")

# without the suite there is nothing here to run: `pytest tests` passes this folder by
collect_ignore_glob = [] if SUITE else ["test_*.py"]

if SUITE:
    sys.path.insert(0, SUITE)
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from shim import pytest_collection_modifyitems  # noqa: F401

    torch.set_num_threads(1)


def pytest_configure(config):
    """Name the marks of peft's tests, as peft's own settings are not read here."""
    for mark in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", f"{mark}: peft's")
