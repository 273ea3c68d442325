"""Frozen values that the kernel's XFRM messages are decoded into.

Addresses are `bytes` in network order, 4 long for IPv4 and 16 for IPv6: such values are cheap to compare and hash.
`vppipsec.kernel.text` prints them. SPIs, ports and reqids are plain integers in host order. Types with thousands of
values are NamedTuples, which are several times faster than dataclasses. Source of every field: include/uapi/linux/xfrm.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

XFRM_INF = (1 << 64) - 1
"""Value of an unset limit of bytes or packets (XFRM_INF)."""


class MsgType(IntEnum):
    """Message types of NETLINK_XFRM (XFRM_MSG_*)."""

    NEWSA = 0x10
    DELSA = 0x11
    GETSA = 0x12
    NEWPOLICY = 0x13
    DELPOLICY = 0x14
    GETPOLICY = 0x15
    ALLOCSPI = 0x16
    ACQUIRE = 0x17
    EXPIRE = 0x18
    UPDPOLICY = 0x19
    UPDSA = 0x1A
    POLEXPIRE = 0x1B
    FLUSHSA = 0x1C
    FLUSHPOLICY = 0x1D
    NEWAE = 0x1E
    GETAE = 0x1F
    REPORT = 0x20
    MIGRATE = 0x21
    NEWSADINFO = 0x22
    GETSADINFO = 0x23
    NEWSPDINFO = 0x24
    GETSPDINFO = 0x25
    MAPPING = 0x26
    SETDEFAULT = 0x27
    GETDEFAULT = 0x28


class MulticastGroup(IntEnum):
    """Multicast groups of NETLINK_XFRM (XFRMNLGRP_*)."""

    ACQUIRE = 1
    EXPIRE = 2
    SA = 3
    POLICY = 4
    AEVENTS = 5
    REPORT = 6
    MIGRATE = 7
    MAPPING = 8


class Attr(IntEnum):
    """Attributes of NETLINK_XFRM (XFRMA_*)."""

    ALG_AUTH = 1
    ALG_CRYPT = 2
    ALG_COMP = 3
    ENCAP = 4
    TMPL = 5
    SA = 6
    POLICY = 7
    SEC_CTX = 8
    LTIME_VAL = 9
    REPLAY_VAL = 10
    REPLAY_THRESH = 11
    ETIMER_THRESH = 12
    SRCADDR = 13
    COADDR = 14
    LASTUSED = 15
    POLICY_TYPE = 16
    MIGRATE = 17
    ALG_AEAD = 18
    KMADDRESS = 19
    ALG_AUTH_TRUNC = 20
    MARK = 21
    TFCPAD = 22
    REPLAY_ESN_VAL = 23
    SA_EXTRA_FLAGS = 24
    PROTO = 25
    ADDRESS_FILTER = 26
    PAD = 27
    OFFLOAD_DEV = 28
    SET_MARK = 29
    SET_MARK_MASK = 30
    IF_ID = 31
    MTIMER_THRESH = 32
    SA_DIR = 33


class Proto(IntEnum):
    """IP protocol of an SA (IPPROTO_*)."""

    COMP = 108
    ESP = 50
    AH = 51


class Mode(IntEnum):
    """Encapsulation mode of an SA or a template (XFRM_MODE_*)."""

    TRANSPORT = 0
    TUNNEL = 1
    ROUTEOPTIMIZATION = 2
    IN_TRIGGER = 3
    BEET = 4


class SaFlag(IntEnum):
    """Flags of an SA (XFRM_STATE_*); those from 1 << 16 on are extra flags (XFRM_SA_XFLAG_*), shifted."""

    NOECN = 1
    DECAP_DSCP = 2
    NOPMTUDISC = 4
    WILDRECV = 8
    ICMP = 16
    AF_UNSPEC = 32
    ALIGN4 = 64
    ESN = 128


class SaExtraFlag(IntEnum):
    """Extra flags of an SA (XFRM_SA_XFLAG_*)."""

    DONT_ENCAP_DSCP = 1
    OSEQ_MAY_WRAP = 2


class SaDir(IntEnum):
    """Direction of an SA (XFRM_SA_DIR_*). The kernel reports it from Linux 6.10 on."""

    IN = 1
    OUT = 2


class PolicyDir(IntEnum):
    """Direction of a policy (XFRM_POLICY_*)."""

    IN = 0
    OUT = 1
    FWD = 2


class PolicyAction(IntEnum):
    """Action of a policy (XFRM_POLICY_ALLOW, XFRM_POLICY_BLOCK)."""

    ALLOW = 0
    BLOCK = 1


class PolicyType(IntEnum):
    """Kind of a policy (XFRM_POLICY_TYPE_*)."""

    MAIN = 0
    SUB = 1


@dataclass(frozen=True, slots=True)
class Selector:
    """Selects packets (struct xfrm_selector). `family` is AF_INET, AF_INET6 or 0. Ports are in host order, with masks."""

    family: int
    daddr: bytes
    prefixlen_d: int
    saddr: bytes
    prefixlen_s: int
    proto: int = 0
    dport: int = 0
    dport_mask: int = 0
    sport: int = 0
    sport_mask: int = 0
    ifindex: int = 0
    user: int = 0

    @property
    def is_for_two_hosts(self) -> bool:
        """True if both prefixes are host addresses."""
        return self.prefixlen_s == 8 * len(self.saddr) and self.prefixlen_d == 8 * len(self.daddr)


@dataclass(frozen=True, slots=True)
class Mark:
    """A firewall mark under a mask (struct xfrm_mark)."""

    value: int
    mask: int


class Limits(NamedTuple):
    """Lifetime limits (struct xfrm_lifetime_cfg). Unset bytes and packets are XFRM_INF, unset seconds are 0."""

    soft_bytes: int
    hard_bytes: int
    soft_packets: int
    hard_packets: int
    soft_add_s: int
    hard_add_s: int
    soft_use_s: int
    hard_use_s: int


NO_LIMITS = Limits(XFRM_INF, XFRM_INF, XFRM_INF, XFRM_INF, 0, 0, 0, 0)


class Usage(NamedTuple):
    """Use so far (struct xfrm_lifetime_cur): bytes, packets, and times of addition and first use, s since 1970."""

    bytes: int
    packets: int
    add_time: int
    use_time: int


class Algorithm(NamedTuple):
    """An algorithm with its key. `name` is the kernel's name, such as `cbc(aes)`.

    `icv_bits` is the ICV length of AEAD algorithms, and the truncation length of integrity algorithms. It is 0 for
    ciphers, and if the kernel does not report it (XFRMA_ALG_AUTH). The key never shows in `repr`.
    """

    name: str
    key: bytes
    icv_bits: int = 0

    def __repr__(self) -> str:
        return f"Algorithm(name={self.name!r}, icv_bits={self.icv_bits})"


@dataclass(frozen=True, slots=True)
class Encap:
    """ESP in UDP (struct xfrm_encap_tmpl): kind (2 is UDP_ENCAP_ESPINUDP), ports in host order, original address."""

    kind: int
    sport: int
    dport: int
    oa: bytes


class ReplayState(NamedTuple):
    """Sequence numbers and window (struct xfrm_replay_state and xfrm_replay_state_esn).

    `window` is in packets. It is 0 in the short form: then the SA's own field has it. `oseq` and `seq` have 64 bits
    with ESN. `bitmap` has the kernel's words of 32 bits, lowest first.
    """

    oseq: int
    seq: int
    window: int
    bitmap: tuple[int, ...]
    esn: bool


@dataclass(frozen=True, slots=True)
class OffloadDev:
    """Hardware offload (struct xfrm_user_offload)."""

    ifindex: int
    flags: int


class SaStats(NamedTuple):
    """Dropped packets of an SA, as the kernel counts them (struct xfrm_stats)."""

    replay_window: int
    replay: int
    integrity_failed: int


class SaId(NamedTuple):
    """Identifies an SA in the kernel: destination, SPI, protocol and mark. It is a tuple for fast hashing."""

    daddr: bytes
    spi: int
    proto: int
    mark: Mark | None = None


class Sa(NamedTuple):
    """One SA (struct xfrm_usersa_info and its attributes).

    `replay_window` is the effective window in packets, from XFRMA_REPLAY_ESN_VAL if that is present.
    `set_mark` has the mask ~0 if the kernel sends none. `auth` comes from XFRMA_ALG_AUTH_TRUNC if that is present,
    else from XFRMA_ALG_AUTH.
    """

    daddr: bytes
    saddr: bytes
    spi: int
    proto: int
    family: int
    mode: int
    reqid: int
    seq: int
    replay_window: int
    flags: int
    extra_flags: int
    selector: Selector
    limits: Limits
    usage: Usage
    stats: SaStats
    crypt: Algorithm | None = None
    auth: Algorithm | None = None
    aead: Algorithm | None = None
    comp: Algorithm | None = None
    encap: Encap | None = None
    mark: Mark | None = None
    set_mark: Mark | None = None
    if_id: int = 0
    direction: int = 0
    replay: ReplayState | None = None
    offload: OffloadDev | None = None
    coaddr: bytes | None = None
    tfcpad: int = 0
    last_used: int = 0

    @property
    def id(self) -> SaId:
        """Identifies this SA in the kernel."""
        return SaId(self.daddr, self.spi, self.proto, self.mark)

    @property
    def larval(self) -> bool:
        """True if the SA is only a reservation, after ALLOCSPI or ACQUIRE. It has no algorithm yet."""
        return self.crypt is None and self.auth is None and self.aead is None and self.comp is None


@dataclass(frozen=True, slots=True)
class Template:
    """One transformation that a policy asks for (struct xfrm_user_tmpl). `spi` 0 and unspecified addresses match any."""

    daddr: bytes
    saddr: bytes
    spi: int
    proto: int
    family: int
    mode: int
    reqid: int
    share: int
    optional: bool
    aalgos: int
    ealgos: int
    calgos: int


@dataclass(frozen=True, slots=True)
class PolicyId:
    """Identifies a policy in the kernel: selector, direction, mark, if_id and type."""

    selector: Selector
    direction: int
    mark: Mark | None
    if_id: int
    type: int


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy (struct xfrm_userpolicy_info and its attributes). The lower `priority` number takes precedence."""

    selector: Selector
    direction: int
    action: int
    priority: int
    index: int
    flags: int
    share: int
    type: int
    templates: tuple[Template, ...]
    limits: Limits
    usage: Usage
    mark: Mark | None = None
    if_id: int = 0
    offload: OffloadDev | None = None

    @property
    def id(self) -> PolicyId:
        """Identifies this policy in the kernel."""
        return PolicyId(self.selector, self.direction, self.mark, self.if_id, self.type)
