"""Two strongSwan peers that negotiate real CHILD_SAs: `a`, the router, is the guest itself; `b` is in a namespace.

    a: 10.9.0.1, fd09::1  --veth--  b: 10.9.0.2, fd09::2

Behind each, on a dummy interface, are the subnets of its CHILD_SAs: number 1 is 10.1.1.0/24 at `a` and 10.1.2.0/24 at
`b`. Only `a` starts rekeys. Run it in the guest, as root; everything ends with the guest.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")

ADDRESSES = {"a": ("10.9.0.1", "fd09::1"), "b": ("10.9.0.2", "fd09::2")}
_SIDE = {"a": 1, "b": 2}
_OTHER = {"a": "b", "b": "a"}
PATIENCE_S = 60.0
"""Time limit for every event in the lab, s, on an emulated processor with other load."""


class LabError(Exception):
    """An expected event in the lab did not happen; the text says which, in a sentence."""


def until(what: str, look: Callable[[], T | Literal[False] | None], patience_s: float = PATIENCE_S) -> T:
    """Repeat a check until it returns something true, and return that.

    Raises LabError with `action` after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise LabError(f"{what} did not come about within {patience_s:.0f} s")
        time.sleep(0.05)
    return found


def run(*command: str, text: str | None = None) -> str:
    """Run a command, which must succeed, and return its output. Raises LabError with its last lines."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE_S * 2)
    if done.returncode:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise LabError(f"'{' '.join(command)}' failed: {said or 'it says nothing'}")
    return done.stdout


@dataclass(frozen=True)
class Child:
    """A CHILD_SA to negotiate.

    `at_a` are swanctl options for `a` alone, `at_both` for both; `subnet` lacks the side.
    """

    name: str
    about: str
    ike: str
    subnet: str
    proposal: str
    at_both: str = ""
    at_a: str = ""

    def network(self, name: str) -> str:
        """Return the prefix behind a peer."""
        return self.subnet.format(_SIDE[name])

    def host(self, name: str) -> str:
        """Return the peer's own address within that prefix."""
        prefix = self.network(name).split("/")[0]
        return f"{prefix}1" if ":" in prefix else prefix[:-1] + "1"


GCM = Child("gcm", "AES-GCM-256", "v4", "10.1.{}.0/24", "aes256gcm16")
CBC = Child("cbc", "AES-CBC-128, HMAC-SHA-256", "v4", "10.2.{}.0/24", "aes128-sha256")
ESN = Child("esn", "AES-GCM-128, ESN, window of 1024", "v4", "10.3.{}.0/24", "aes128gcm16-esn", "replay_window = 1024")
NATT = Child("natt", "AES-CBC-256, HMAC-SHA-256, NAT-T", "natt", "10.4.{}.0/24", "aes256-sha256")
SIX = Child("six", "AES-GCM-256, IPv6 in IPv6", "v6", "fd0{}::/64", "aes256gcm16")
TIMED = Child(
    "timed",
    "AES-GCM-128, rekeyed every 3 s",
    "v4",
    "10.5.{}.0/24",
    "aes128gcm16",
    at_a="rekey_time = 3s\n rand_time = 0s\n life_time = 60s",
)
COUNTED = Child(
    "counted",
    "AES-CBC-128, HMAC-SHA-256, rekeyed after 20000 bytes",
    "v4",
    "10.6.{}.0/24",
    "aes128-sha256",
    at_a="rekey_bytes = 20000\n rand_bytes = 0\n life_bytes = 1000000",
)
KINDS = (GCM, CBC, ESN, NATT, SIX)
"""One CHILD_SA of each kind. Those over IPv4 are several tunnels between the same two addresses."""
CHILDREN = (*KINDS, TIMED, COUNTED)

_IKE = {"v4": "", "natt": "encap = yes", "v6": ""}
"""IKE_SAs, with their special options."""

_STRONGSWAN = """
charon-systemd {{
  load = random nonce drbg kdf aes sha1 sha2 hmac gmp kernel-netlink socket-default vici
  install_routes = no
  interfaces_use = {interface}
  delete_rekeyed_delay = 1
  plugins {{ vici {{ socket = {uri} }} }}
  filelog {{ main {{
      path = {dir}/charon.log
      time_format = %H:%M:%S
      default = 1
      flush_line = yes
  }} }}
  journal {{ default = -1 }}
}}
"""


class Peer:
    """One strongSwan with its configuration, control socket and log in a directory of its own."""

    def __init__(
        self, name: str, directory: Path, interface: str, conf: Callable[[Container[Child]], str], *inside: str
    ) -> None:
        """Prepare a peer on an interface; `inside` is the command that runs another command in its namespace.

        `conf` returns its swanctl.conf, in which the given CHILD_SAs start with a trap policy.
        """
        self.name = name
        self._interface = interface
        self._conf = conf
        self.log = directory / "charon.log"
        self._dir = directory
        self._uri = f"unix://{directory}/vici.sock"
        self._command = (*inside, "env", f"STRONGSWAN_CONF={directory}/strongswan.conf")

    def start(self) -> None:
        """Start the daemon and load its configuration."""
        self._dir.mkdir(parents=True, exist_ok=True)
        (self._dir / "strongswan.conf").write_text(
            _STRONGSWAN.format(interface=self._interface, dir=self._dir, uri=self._uri)
        )
        with (self._dir / "out").open("wb") as out:
            self._process = subprocess.Popen([*self._command, "charon-systemd"], stdout=out, stderr=out)
        until(f"the control socket of strongSwan '{self.name}'", (self._dir / "vici.sock").exists)
        self.load()

    def load(self, *traps: Child) -> None:
        """Load the configuration, in which `traps` start with a trap policy.

        Remove the trap policies of an earlier one.
        """
        (self._dir / "swanctl.conf").write_text(self._conf(traps))
        self.swanctl("--load-all", "--file", f"{self._dir}/swanctl.conf")

    def end(self) -> None:
        """End the daemon."""
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def swanctl(self, *arguments: str) -> str:
        """Run a swanctl command against this peer and return its output. Raises LabError."""
        return run(*self._command, "swanctl", *arguments, "--uri", self._uri)


class Peers:
    """The two peers and the wire between them. Actions run at `a`, and results are read from the kernel of `a`."""

    def __init__(self, directory: Path) -> None:
        self.a = Peer("a", directory / "a", "va", partial(_swanctl_conf, "a"))
        self.b = Peer("b", directory / "b", "vb", partial(_swanctl_conf, "b"), "ip", "netns", "exec", "b")

    def start(self) -> None:
        """Create wire, addresses and routes, and start both daemons."""
        run("ip", "netns", "add", "b")
        run("ip", "link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", "b")
        run("ip", "-batch", "-", text=_network_of("a"))
        run("ip", "-netns", "b", "-batch", "-", text=_network_of("b"))
        self.a.start()
        self.b.start()

    def up(self, *children: Child) -> None:
        """Negotiate CHILD_SAs, one after the other."""
        for child in children:
            self.a.swanctl("--initiate", "--child", child.name, "--timeout", "20")

    def rekey(self, child: Child) -> None:
        """Start the rekeying of a CHILD_SA; it continues after this returns."""
        self.a.swanctl("--rekey", "--child", child.name)

    def down(self, child: Child) -> None:
        """Delete a CHILD_SA."""
        self.a.swanctl("--terminate", "--child", child.name)

    def all_down(self) -> None:
        """Delete all IKE_SAs with their CHILD_SAs."""
        for name in set(re.findall(r"^(\w+): #", self.a.swanctl("--list-sas"), re.MULTILINE)):
            self.a.swanctl("--terminate", "--ike", name)

    def ping(self, child: Child, count: int = 3, size: int = 56) -> None:
        """Send packets of `size` bytes through a CHILD_SA to the other side and back.

        Raises LabError if one is lost.
        """
        ends = ("-I", child.host("a"), child.host("b"))
        said = run("ping", "-q", "-c", str(count), "-s", str(size), "-i", "0.02", "-W", "2", *ends)
        if ", 0% packet loss" not in said:
            raise LabError(f"packets were lost between {child.host('a')} and {child.host('b')}")


def kernel_spis(child: Child | None = None) -> frozenset[int]:
    """Return the kernel's SPIs of a CHILD_SA, or all of them, as iproute2 reads them."""
    only: tuple[str, ...] = ()
    if child is not None:
        policies = run("ip", "xfrm", "policy", "list", "dir", "out", "dst", child.network("b"))
        reqid = re.search(r"\breqid (\d+)", policies)
        if reqid is None:
            return frozenset()
        only = ("reqid", reqid[1])
    states = run("ip", "xfrm", "state", "list", *only, "nokeys")
    return frozenset(int(spi, 16) for spi in re.findall(r"\bproto esp spi (0x[0-9a-f]+)", states))


def replaced(child: Child, before: frozenset[int]) -> frozenset[int]:
    """Wait until the kernel has a pair of SAs for a CHILD_SA and none of the earlier ones; return its SPIs.

    Raises LabError.
    """
    if len(before) != 2:
        raise LabError(f"'{child.name}' had {len(before)} SAs before its rekey, not a pair")

    def look() -> frozenset[int] | None:
        now = kernel_spis(child)
        return now if len(now) == 2 and now.isdisjoint(before) else None

    return until(f"a new pair of SAs for '{child.name}'", look)


def _network_of(name: str) -> str:
    """Return the lines of `ip -batch` that give a peer its addresses and routes."""
    here, there, device = ADDRESSES[name], ADDRESSES[_OTHER[name]], f"v{name}"
    lines = [
        f"addr add {here[0]}/24 dev {device}",
        f"addr add {here[1]}/64 dev {device} nodad",
        f"link set {device} up",
        "link add d0 type dummy",
        "link set d0 up",
    ]
    for child in CHILDREN:
        length = child.network(name).split("/")[1]
        gateway = there[":" in child.subnet]
        lines.append(f"addr add {child.host(name)}/{length} dev d0" + (" nodad" if ":" in child.subnet else ""))
        lines.append(f"route add {child.network(_OTHER[name])} via {gateway}")
    return "\n".join(lines) + "\n"


def _swanctl_conf(name: str, traps: Container[Child]) -> str:
    """Return a peer's configuration in swanctl's format (swanctl.conf(5))."""
    other = _OTHER[name]
    lines = ["connections {"]
    for ike, special in _IKE.items():
        lines += [
            f"{ike} {{",
            "version = 2",
            f"local_addrs = {ADDRESSES[name][ike == 'v6']}",
            f"remote_addrs = {ADDRESSES[other][ike == 'v6']}",
            "proposals = aes128-sha256-modp2048",
            special,
            f"local {{\n auth = psk\n id = {ike}.{name}.test\n }}",
            f"remote {{\n auth = psk\n id = {ike}.{other}.test\n }}",
            "children {",
        ]
        for child in (child for child in CHILDREN if child.ike == ike):
            lines += [
                f"{child.name} {{",
                f"local_ts = {child.network(name)}",
                f"remote_ts = {child.network(other)}",
                f"esp_proposals = {child.proposal}",
                child.at_both,
                child.at_a if name == "a" else "",
                "start_action = trap" if child in traps else "",
                "}",
            ]
        lines.append("}\n}")
    lines.append('}\nsecrets {\n ike-lab {\n secret = "only for the lab"\n }\n}')
    return "\n".join(lines) + "\n"
