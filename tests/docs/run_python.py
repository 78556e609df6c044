"""Run the Python blocks of pages, each page in a folder of its own, and report what failed as JSON.

One process for all pages, because importing torch and trl takes longer than all blocks together. A page's blocks share
their names, as they would where a reader pastes one after the other.

    python run_python.py PLAN.json      {page: {"folder": ..., "blocks": [...]}} in, {page: traceback} out
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path


def run(folder: str, blocks: list[str]) -> str | None:
    """Run one page's blocks in its folder; the traceback of what failed, or None."""
    os.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for block in blocks:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, f"{folder}/block", "exec"), names)
    except Exception:  # noqa: BLE001  # whatever a block raises is the finding
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(sys.argv[1]).write_text(json.dumps({page: run(**what) for page, what in plan.items()}), "utf-8")
