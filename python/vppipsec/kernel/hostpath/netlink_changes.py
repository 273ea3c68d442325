"""What those have in common who change the kernel's routes, rules and filters: how ours are told from others', and that what the
kernel refuses costs nothing but itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vppipsec.kernel.netlink.messages import NetlinkError

GONE_ERRNOS = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
"""What the kernel says where what is to be removed is not there."""


class ChangeRunner:
    """Changes that are asked for one by one. `problems` are what did not come about, in sentences."""

    def __init__(self, refused: type[Exception]) -> None:
        """Take what is raised where the kernel refuses, besides OSError; its `code` is the errno."""
        self.problems: list[str] = []
        self._refused = refused

    def _try(self, what: str, change: Callable[[], object], as_good: tuple[int, ...] = ()) -> bool:
        """Make a change, and tell whether it came about; an errno of `as_good` is as good as that."""
        try:
            change()
        except (self._refused, OSError) as error:
            reason = int(getattr(error, "code", 0) or getattr(error, "errno", 0) or 0)
            if reason not in as_good:
                self.problems.append(str(NetlinkError(what, reason)))
                return False
        return True
