"""Where the planner's compiled code is kept: compiling takes most of a minute."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def choose_cache() -> None:
    """That of the package's own environment, if it has the same numba, else a folder in this environment."""
    # Environments with another numba, working on the same checkout, must not write into one cache.
    if not list(ROOT.glob(f".venv/lib/python*/site-packages/numba-{version('numba')}.dist-info")):
        os.environ["NUMBA_CACHE_DIR"] = str(Path(sys.prefix) / "numba")
