"""Shows that the guest on the machine's own kernel leaves the machine unchanged. Run it in a guest without other
processes.

Its job changes visible things: SAs, policies, links, namespaces, files, settings, and a process that ends only when
killed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from guest import PATH
from own import OwnKernel, loaded_modules
from peers import run

LIMIT_S = 120.0
OTHERS = "others0"
"""A link that is none of the job's."""
_SETTINGS = ("net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "vm/swappiness", "kernel/hostname")
_WRITTEN = Path("/mnt/host/mnt/upper")
"""Files written in this guest, below its overlay, where it has one."""
_PLACES = ("/dev", "/run", str(_WRITTEN))

JOB = """
set -e
ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 0x100 reqid 1 mode tunnel \
    aead "rfc4106(gcm(aes))" 0x000102030405060708090a0b0c0d0e0f10111213 128
ip xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir out tmpl src 10.0.0.1 dst 10.0.0.2 proto esp reqid 1 mode tunnel
ip netns add left
ip link add left0 type veth peer name left1 netns left
ip -netns left link add left2 type dummy
for place in /dev/shm /run /tmp /etc /var/tmp /root /etc/systemd/system; do echo left >$place/left; done
rm -f /etc/hostname
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter
hostname left
! echo 1 2>/dev/null >/proc/sys/vm/swappiness
mount -t tmpfs left /mnt
(trap '' TERM HUP INT; exec setsid sleep 1000) >/dev/null 2>&1 &
echo "SAs: $(ip xfrm state count)"
echo "modules: $(wc -l </proc/modules)"
"""


def snapshot() -> dict[str, list[str]]:
    """Return everything on the machine that a job could change, by kind."""
    found = subprocess.run(
        ["find", *_PLACES, "-not", "-path", "*/lab-*", "-not", "-name", "__pycache__", "-not", "-name", "*.pyc"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    ).stdout
    commands = [path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline")]
    return {
        "modules": sorted(loaded_modules()),
        "processes": sorted(command.replace("\0", " ") for command in commands if command),  # kernel threads have none
        "links": run("ip", "-o", "link").splitlines(),
        "addresses": run("ip", "-o", "addr").splitlines(),
        "namespaces": run("ip", "netns", "list").splitlines(),
        "states": run("ip", "xfrm", "state", "list").splitlines(),
        "policies": run("ip", "xfrm", "policy", "list").splitlines(),
        "mounts": Path("/proc/self/mounts").read_text().splitlines(),
        "settings": [f"{name}={Path('/proc/sys', name).read_text().strip()}" for name in _SETTINGS],
        "files": sorted(found.splitlines()),
    }


def main() -> int:
    """Run the job and compare. Returns 0 where nothing differs and the job succeeded."""
    snapshot()  # the snapshot itself has effects: it loads modules for netlink
    Path("/tmp/any").touch()  # the overlay has a /tmp from now on
    before = snapshot()
    said: list[str] = []
    with OwnKernel() as guest:
        run("ip", "link", "add", OTHERS, "type", "dummy")  # something else uses a module from now on, as the job does
        directory = guest.directory
        status = guest.run(["sh", "-c", JOB], {"PATH": PATH}, LIMIT_S, said.append)
        console = (directory / "console").read_text()
    if OTHERS not in run("ip", "-o", "link"):
        print(f"{OTHERS} is gone: the module of a link that something else has made was unloaded")
        return 1
    run("ip", "link", "delete", OTHERS)
    run("rmmod", "dummy")
    after = snapshot()
    print(*said, console.strip(), sep="\n")
    if status or "SAs: \t SAD count 1" not in said:
        print(f"the job did not do what it should: status {status}")
        return 1
    if directory.exists():
        print(f"{directory} is left")
        return 1
    for kind in before:
        for line in sorted(set(before[kind]) ^ set(after[kind])):
            print(f"{kind}: {'is left' if line in after[kind] else 'is gone'}: {line}")
    return 0 if before == after else 1


if __name__ == "__main__":
    sys.exit(main())
