"""The scripts under test lie outside the library: the build step in tools/."""

import sys

from support.recorded import ROOT

sys.path.insert(0, str(ROOT / "tools"))
