"""Where the recorded data that some tests read lies; a test skips where it is absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_data(*parts: str) -> Path:
    """Return the path of recorded data (`../shared/data` beside the project, or $VPPIPSEC_SHARED), or skip the test."""
    base = Path(os.environ.get("VPPIPSEC_SHARED", ROOT.parent / "shared")) / "data"
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"recorded data {'/'.join(parts)} is not on this machine")
    return path
