"""The demo: boots a kernel with ESP and shows in it how VPP follows real strongSwan tunnels. Ends with 0 only if every step held.

VPP is a real one where VPP_BIN names it or a `vpp` is in PATH, else the stand-in.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time

from guest import HERE, GuestError, lab_environment
from uml import Uml

LIMIT_S = 180.0


def main() -> int:
    """Run the demo."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, with everything that was started
    environment = lab_environment()
    found = shutil.which("vpp")
    if not environment.get("VPP_BIN") and found is not None:
        environment["VPP_BIN"] = found
    began = time.monotonic()
    print("Booting a Linux kernel with ESP (user-mode Linux); nothing of this machine is touched.")
    try:
        with Uml() as guest:
            status = guest.run([sys.executable, str(HERE / "tour.py")], environment, LIMIT_S)
    except GuestError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; everything that was started has ended.", file=sys.stderr)
        return 130
    print(f"Took {time.monotonic() - began:.0f} s. Nothing of it is left.")
    return status


if __name__ == "__main__":
    sys.exit(main())
