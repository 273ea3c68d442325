"""Where the recorded data that some tests read lies; a test skips where it is absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def data_directory() -> Path:
    """Return where recorded data would be: `../shared/data` beside the project, or in $VPPIPSEC_SHARED."""
    return Path(os.environ.get("VPPIPSEC_SHARED", ROOT.parent / "shared")) / "data"


def shared_data(*parts: str) -> Path:
    """Return the path of recorded data, or skip the test."""
    path = data_directory().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"recorded data {'/'.join(parts)} is not on this machine")
    return path
