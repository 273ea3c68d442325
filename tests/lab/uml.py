"""The guest that is an ordinary process: user-mode Linux, at native speed, without a virtual machine or a download.

Debian's kernel for it has no xfrm interfaces and no vhost-net, so it has no VTIs and no linux-cp interfaces of VPP. It
crashes on processors whose state is larger than its buffer, such as those with AMX.
"""

from __future__ import annotations

from typing import ClassVar

from guest import HERE, Guest


class Uml(Guest):
    """A guest of user-mode Linux."""

    name = "user-mode Linux"
    programs: ClassVar = {"linux.uml": "user-mode-linux", "unshare": "util-linux"}
    start_s = 30.0

    def _command_line(self) -> list[str]:
        # The kernel consists of many processes. In a PID namespace of their own they all end with its first process.
        # That ends with `unshare`, and `unshare` with us. The first process is a shell: a kernel that panics aborts,
        # which a first process cannot. The kernel keeps a host file open for each of its inodes, so it gets the highest
        # limit.
        return [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", 'ulimit -n "$(ulimit -H -n)"; "$@"; exit', "sh"),
            *("linux.uml", "rootfstype=hostfs", "rootflags=/", "ro", f'init="{HERE / "init.sh"}"'),
            *(f"mem={self._memory_mb}M", "quiet", "loglevel=1", "uml_dir=.", "umid=guest"),
            *("con=null", "con0=null,fd:2", "ssl=null", "ssl0=null,fd:1"),
            *(f'LAB_JOB="{self.directory}"', "LAB_SHARE=hostfs", "LAB_OUTPUT=/dev/ttyS0"),
        ]
