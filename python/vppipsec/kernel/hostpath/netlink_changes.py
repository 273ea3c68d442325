"""Base class for code that changes the kernel's routes, rules and filters. A refused change does not stop the others."""

from __future__ import annotations

import errno
from collections.abc import Callable

from vppipsec.kernel.netlink.messages import NetlinkError

GONE_ERRNOS = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
"""Errors of the kernel for the removal of an object that does not exist."""


class ChangeRunner:
    """Makes changes one by one. `problems` lists the failed ones, in sentences."""

    def __init__(self, refused: type[Exception]) -> None:
        """`refused` is the exception for a refusal by the kernel, besides OSError; its `code` is the errno."""
        self.problems: list[str] = []
        self._refused = refused

    def _try(self, what: str, change: Callable[[], object], as_good: tuple[int, ...] = ()) -> bool:
        """Make a change and return whether it succeeded. An errno in `as_good` counts as success."""
        try:
            change()
        except (self._refused, OSError) as error:
            reason = int(getattr(error, "code", 0) or getattr(error, "errno", 0) or 0)
            if reason not in as_good:
                self.problems.append(str(NetlinkError(what, reason)))
                return False
        return True
