"""A kernel with an IKE daemon: installs, rekeys, moves and deletes CHILD_SAs message by message as charon 5.9 does."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from support.build import CBC, GCM, LOCAL, LOCAL6, REMOTE, REMOTE6, SHA256, make_policy, make_sa
from support.fake_kernel import FakeKernel
from vppipsec.kernel.netlink.messages import NetlinkError
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.events import Event, PoliciesFlushed, SaExpired, SasFlushed
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import Algorithm, Encap, Policy, PolicyAction, PolicyDir, Sa, SaId, Usage

ELSEWHERE = parse_addr("192.0.2.77")
ELSEWHERE6 = parse_addr("2001:db8::77")
REKEY_S = 0.05
"""Duration of a rekey's negotiation."""


@dataclass
class Child:
    """One configured CHILD_SA: the form of its SAs and policies, and its pairs of SAs, oldest first."""

    reqid: int
    src: str
    dst: str
    ends: tuple[bytes, bytes]
    moves_to: bytes
    cipher: Callable[[bytes], dict[str, object]]
    nat: bool = False
    priority: int = 1000

    def __post_init__(self) -> None:
        self.pairs: list[tuple[Sa, Sa]] = []
        self.port = 4500

    def policies(self) -> list[Policy]:
        """Return its policies in their present form."""
        return [
            make_policy(PolicyDir.OUT, self.src, self.dst, self.reqid, self.ends, priority=self.priority),
            make_policy(PolicyDir.IN, self.dst, self.src, self.reqid, self.ends, priority=self.priority),
            make_policy(PolicyDir.FWD, self.dst, self.src, self.reqid, self.ends, priority=self.priority),
        ]


def _gcm(key: bytes) -> dict[str, object]:
    return {"aead": Algorithm(GCM.name, key + b"salt", 128)}


def _cbc(key: bytes) -> dict[str, object]:
    return {"aead": None, "crypt": Algorithm(CBC.name, key[:16]), "auth": Algorithm(SHA256.name, key, 128)}


def _unknown(key: bytes) -> dict[str, object]:
    return {"aead": None, "crypt": Algorithm("cbc(camellia)", key), "auth": Algorithm(SHA256.name, key, 128)}


def children() -> list[Child]:
    """Return CHILD_SAs of different kinds.

    They have NAT-T, IPv6, two between the same ends, one prefix for two, and one that is not for VPP.
    """
    here, there = "10.1.0.0/24", "10.2.0.0/24"
    return [
        Child(1, here, there, (LOCAL, REMOTE), ELSEWHERE, _gcm),
        Child(2, here, "10.3.0.0/24", (LOCAL, REMOTE), ELSEWHERE, _cbc, nat=True),
        Child(3, "fd01::/64", "fd02::/64", (LOCAL6, REMOTE6), ELSEWHERE6, _gcm),
        Child(4, "10.9.0.0/24", there, (LOCAL, parse_addr("192.0.2.4")), parse_addr("192.0.2.5"), _gcm, priority=900),
        Child(5, here, "10.5.0.0/24", (LOCAL, parse_addr("192.0.2.6")), parse_addr("192.0.2.7"), _unknown),
    ]


class Charon(FakeKernel):
    """The kernel and its IKE daemon. Every message is one call of `changed`, so that a test can check in between."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.children = children()
        self.asked: list[tuple[float, SaId]] = []
        """SAs that the IKE daemon was asked to rekey, and when (time of the event loop, s)."""
        self.deaf_to = 0
        """Number of rekey requests that it ignores."""
        self.on_change: Callable[[], None] | None = None
        self.on_asked: Callable[[Sa], None] | None = None
        self.reqid_of: dict[int, int] = {}
        """The reqid of each SPI, present or past."""
        self.unheard = False
        """True when a change was not announced, and no dump has followed."""
        self._clock = clock
        self._made = 0

    # The kernel's part

    def changed(self, event: Event) -> None:
        self.unheard |= self.silent
        if self.on_change is not None:
            self.on_change()
        super().changed(event)

    async def dump_policies(self) -> list[Policy]:
        self.unheard = False
        return await super().dump_policies()

    def remove(self, *items: Sa | Policy) -> None:
        """Delete those of the given items that exist, in order."""
        for item in items:
            if item.id in self.sas or item.id in self.policies:
                self.delete(item)

    def flush_sas(self) -> None:
        """`ip xfrm state flush`: charon does not notice."""
        if self.sas:
            self.sas.clear()
            self.changed(SasFlushed(0))

    def flush_policies(self) -> None:
        """`ip xfrm policy flush`."""
        if self.policies:
            self.policies.clear()
            self.changed(PoliciesFlushed(0))

    def overflow(self, changes: Callable[[], None]) -> None:
        """Make changes whose messages are lost because the receive buffer is full."""
        self.silent = True
        changes()
        self.silent = False
        self.tell(Overflow())

    def expire_hard(self, sa: Sa) -> None:
        """Reach a hard limit: an EXPIRE, and no DELSA."""
        if sa.id in self.sas:
            del self.sas[sa.id]
            self.changed(SaExpired(sa, hard=True))

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.asked.append((loop.time(), sa.id))
        if sa.id not in self.sas:
            raise NetlinkError("the expiry of an SA", errno.ESRCH)
        if self.on_asked is not None:
            self.on_asked(sa)
        if self.deaf_to:
            self.deaf_to -= 1
        else:
            loop.call_later(REKEY_S, self.rekey, sa)

    def rekey(self, sa: Sa) -> None:
        """Rekey an SA's CHILD_SA, unless the SA was rekeyed already."""
        for child in self.children:
            for pair in child.pairs:
                if sa.id in (pair[0].id, pair[1].id):
                    self.rekey_child(child, pair)
                    return

    # Charon's part

    def _pair(self, child: Child, spis: tuple[int, int] | None = None) -> tuple[Sa, Sa]:
        self._made += 1
        local, remote = child.ends
        inbound, outbound = spis or (0xC0000000 + self._made, 0xD0000000 + self._made)
        made = []
        for spi, src, dst in ((inbound, remote, local), (outbound, local, remote)):
            self.reqid_of[spi] = child.reqid
            port = (child.port, 4500) if src == remote else (4500, child.port)
            changes = child.cipher(spi.to_bytes(4, "big") * 8)
            changes["encap"] = Encap(2, *port, bytes(4)) if child.nat else None
            usage = Usage(0, 0, int(self._clock()), 0)
            made.append(make_sa(spi, src, dst, child.reqid, usage=usage, **changes))
        return made[0], made[1]

    def _update(self, child: Child) -> None:
        """Send UPDPOLICY, or NEWPOLICY where the policy does not exist: out, in, fwd."""
        self.add(*child.policies())

    def establish(self, child: Child) -> None:
        """Install a pair and the policies."""
        child.pairs.append(self._pair(child))
        self.add(*child.pairs[-1])
        self._update(child)

    def rekey_child(self, child: Child, pair: tuple[Sa, Sa]) -> None:
        """Replace a pair, make before break; then delete the old pair, outbound first."""
        self.establish(child)
        child.pairs.remove(pair)
        self.remove(pair[1], pair[0])

    def rekey_from_both_sides(self, child: Child) -> None:
        """Both sides rekey at the same time: two new pairs, then the old pair is deleted, then the losing one."""
        if child.pairs:
            old = child.pairs[-1]
            self.establish(child)
            self.establish(child)
            child.pairs.remove(old)
            self.remove(old[1], old[0])
            loser = child.pairs.pop(-2)
            self.remove(loser[1], loser[0])

    def terminate(self, child: Child) -> None:
        """Delete everything."""
        self.remove(*child.policies())
        for inbound, outbound in child.pairs:
            self.remove(outbound, inbound)
        child.pairs.clear()

    def uninstall_policies(self, child: Child) -> None:
        """Delete the policies only."""
        self.remove(*child.policies())

    def prefer(self, child: Child, priority: int) -> None:
        """Give its policies another priority."""
        child.priority = priority
        if child.policies()[0].id in self.policies:
            self._update(child)

    def move(self, child: Child) -> None:
        """MOBIKE: the peer has another address. The SAs are added again with the same SPIs, keys and usage."""
        out, *others = child.policies()
        if out.id in self.policies:
            self.add(replace(out, action=PolicyAction.BLOCK, templates=()))
        self.remove(*others)
        local, remote = child.ends
        child.ends, child.moves_to = (local, child.moves_to), remote
        for number, pair in enumerate(child.pairs):
            moved = self._pair(child, (pair[0].spi, pair[1].spi))
            child.pairs[number] = moved
            for old, new in zip(pair, moved, strict=True):
                if old.id in self.sas:
                    self.delete(old)
                    self.add(new._replace(usage=old.usage))
        if out.id in self.policies:
            self._update(child)

    def toggle_nat(self, child: Child) -> None:
        """A NAT appears between the peers, or disappears. The SAs are added again with the same SPIs and keys."""
        child.nat = not child.nat
        for number, pair in enumerate(child.pairs):
            child.pairs[number] = self._pair(child, (pair[0].spi, pair[1].spi))
            for old, new in zip(pair, child.pairs[number], strict=True):
                if old.id in self.sas:
                    self.delete(old)
                    self.add(new._replace(usage=old.usage))

    def change_port(self, child: Child, port: int) -> None:
        """The NAT gives the peer another port."""
        child.port = port
        for number, pair in enumerate(child.pairs):
            moved = self._pair(child, (pair[0].spi, pair[1].spi))
            child.pairs[number] = moved
            for old, new in zip(pair, moved, strict=True):
                if old.id in self.sas and child.nat:
                    self.add(new._replace(usage=old.usage))

    def some_sa(self, child: Child, which: int) -> Sa | None:
        """Return one of a child's SAs that the kernel has, None where it has none."""
        found = [sa for pair in child.pairs for sa in pair if sa.id in self.sas]
        return found[which % len(found)] if found else None
