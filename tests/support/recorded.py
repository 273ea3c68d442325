"""Shared by all tests: how long they wait, and where recorded data is; a test skips where that is absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0
"""How long a test waits for an expected event, s: far longer than necessary, as the machine may be busy."""


def data_directory() -> Path:
    """Return the directory of recorded data: `../shared/data` next to the project, or in $VPPIPSEC_SHARED."""
    return Path(os.environ.get("VPPIPSEC_SHARED", ROOT.parent / "shared")) / "data"


def shared_data(*parts: str) -> Path:
    """Return the path of recorded data, or skip the test."""
    path = data_directory().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"recorded data {'/'.join(parts)} is not on this machine")
    return path
