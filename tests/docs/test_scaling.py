"""The table of expected efficiencies in the docs is the one that its script prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_scripts() -> None:
    script = ROOT / "tools" / "scaling_note.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert printed.count("|") > 40
    assert printed in (ROOT / "docs" / "scaling.md").read_text("utf-8")
