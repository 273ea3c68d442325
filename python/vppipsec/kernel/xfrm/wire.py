"""Decodes messages of NETLINK_XFRM into typed events.

Sources: include/uapi/linux/netlink.h, include/uapi/linux/xfrm.h, net/xfrm/xfrm_user.c. In messages SPIs, ports and addresses are
in network byte order, other numbers in host byte order. Unknown attributes, XFRMA_PAD and trailing bytes are skipped. A malformed
message raises WireError. Its text names the message and the place, but never contains a key.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable

from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6, HEADER, Attributes, WireError, attributes, message_type
from vppipsec.kernel.xfrm.events import (
    Acquired,
    Event,
    Irrelevant,
    Mapped,
    Migrated,
    MigrateStep,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    PolicyExpired,
    Reported,
    SaAdded,
    SaDeleted,
    SadInfo,
    SaExpired,
    SaProgress,
    SasFlushed,
)
from vppipsec.kernel.xfrm.values import (
    NO_LIMITS,
    Algorithm,
    Attr,
    Encap,
    Limits,
    Mark,
    MsgType,
    OffloadDev,
    Policy,
    PolicyId,
    ReplayState,
    Sa,
    SaFlag,
    SaId,
    SaStats,
    Selector,
    Template,
    Usage,
)

_SELECTOR = struct.Struct("=16s16sHHHHHBBB3xiI")  # struct xfrm_selector, 56 bytes; ports swapped after
_LIMITS = struct.Struct("=8Q")  # struct xfrm_lifetime_cfg
_USAGE = struct.Struct("=4Q")  # struct xfrm_lifetime_cur
_SA_REST = struct.Struct("=16s4sB3x16s8Q4QIIIIIHBBB7x")  # struct xfrm_usersa_info behind its selector
_SA_SIZE = 224
_ID = struct.Struct("=16s4sHBx")  # struct xfrm_usersa_id
_POLICY_REST = struct.Struct("=8Q4QIIBBBB4x")  # struct xfrm_userpolicy_info behind its selector
_POLICY_SIZE = 168
_POLICY_ID_REST = struct.Struct("=IB3x")  # struct xfrm_userpolicy_id behind its selector
_TEMPLATE = struct.Struct("=16s4sB3xH2x16sIBBBxIII")  # struct xfrm_user_tmpl
_ALGORITHM = struct.Struct("=64sI")  # struct xfrm_algo; key follows
_ALGORITHM_ICV = struct.Struct("=64sII")  # struct xfrm_algo_auth and xfrm_algo_aead; key follows
_ENCAP_TMPL = struct.Struct(">HHH2x16s")  # struct xfrm_encap_tmpl; encap_type is in host order, see _encap
_REPLAY = struct.Struct("=III")  # struct xfrm_replay_state: oseq, seq, bitmap
_REPLAY_ESN = struct.Struct(
    "=IIIIII"
)  # struct xfrm_replay_state_esn: bmp_len, oseq, seq, oseq_hi, seq_hi, replay_window
_MARK_VALUE = struct.Struct("=II")
_OFFLOAD = struct.Struct("=iB")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_AEVENT = struct.Struct("=16s4sHBx16sII")  # struct xfrm_aevent_id
_MIGRATE = struct.Struct("=16s16s16s16sBBHIHH")  # struct xfrm_user_migrate
_MAPPING = struct.Struct("=16s4sHBxI16s16sHH")  # struct xfrm_user_mapping; ports in network order
_ACQUIRE_ID = struct.Struct("=16s4sB3x")  # struct xfrm_id
_ACQUIRE_TAIL = struct.Struct("=IIII")  # aalgos, ealgos, calgos, seq of struct xfrm_user_acquire

# numbers of the attributes of an SA: a look-up of enum members is slow
_ALG_AEAD = Attr.ALG_AEAD.value
_ALG_AUTH = Attr.ALG_AUTH.value
_ALG_AUTH_TRUNC = Attr.ALG_AUTH_TRUNC.value
_ALG_COMP = Attr.ALG_COMP.value
_ALG_CRYPT = Attr.ALG_CRYPT.value
_COADDR = Attr.COADDR.value
_ENCAP = Attr.ENCAP.value
_IF_ID = Attr.IF_ID.value
_LASTUSED = Attr.LASTUSED.value
_MARK = Attr.MARK.value
_OFFLOAD_DEV = Attr.OFFLOAD_DEV.value
_REPLAY_ESN_VAL = Attr.REPLAY_ESN_VAL.value
_REPLAY_VAL = Attr.REPLAY_VAL.value
_SA_DIR = Attr.SA_DIR.value
_SA_EXTRA_FLAGS = Attr.SA_EXTRA_FLAGS.value
_SET_MARK = Attr.SET_MARK.value
_TFCPAD = Attr.TFCPAD.value

_DELSA = MsgType.DELSA.value

MAX_BITMAP_WORDS = 128  # XFRMA_REPLAY_ESN_MAX / 32
_NO_STATS = SaStats(0, 0, 0)
_NO_LIMITS_RAW = (0xFFFFFFFFFFFFFFFF,) * 4 + (0,) * 4


def decode_xfrm(message: bytes | memoryview, last_words: bool = True) -> Event:
    """Decode one message with its header. Raises WireError, and no other exception, for any malformed message.

    Without `last_words` it does not decode the SA in a DELSA, nor its keys.
    """
    kind = message_type(message)
    decoder = _XFRM_DECODERS.get(kind)
    if decoder is None:
        raise WireError(f"netlink message of unknown type {kind:#x}, {len(message)} bytes")
    view = memoryview(message)
    length = HEADER.unpack_from(view)[0]
    try:
        if length != len(view):
            raise WireError(f"it claims {length} bytes")
        if kind == _DELSA and not last_words:
            return _on_del_sa_id(view[HEADER.size :])
        return decoder(view[HEADER.size :], kind)
    except WireError as error:
        raise WireError(f"{_type_name(kind)} of {len(view)} bytes: {error}") from None
    except struct.error:
        raise WireError(f"{_type_name(kind)} of {len(view)} bytes is cut short") from None


def _type_name(kind: int) -> str:
    return MsgType(kind).name


def _need(data: memoryview, size: int, kind: Attr) -> memoryview:
    if len(data) < size:
        raise WireError(f"attribute {kind.name} has {len(data)} bytes, {size} are needed")
    return data


def _address(raw: bytes, family: int) -> bytes:
    if family == AF_INET:
        return raw[:4]
    if family == AF_INET6:
        return raw
    raise WireError(f"address family {family}")


_ANY = {
    (_SELECTOR.pack(bytes(16), bytes(16), 0, 0, 0, 0, family, 0, 0, 0, 0, 0), sa_family): Selector(
        family, bytes(size), 0, bytes(size), 0
    )
    for sa_family, size in ((AF_INET, 4), (AF_INET6, 16))
    for family in (0, sa_family)
}
"""The selectors that match everything, by their bytes and the SA's family. Tunnel mode SAs have them."""
_swap_ports = struct.Struct("=HHHH")


def _selector(body: memoryview, offset: int, family_hint: int) -> Selector:
    """Decode a struct xfrm_selector. If it has no family, `family_hint` is that of the SA or of the template."""
    known = _ANY.get((bytes(body[offset : offset + 56]), family_hint))
    if known is not None:
        return known
    daddr, saddr, dport, dport_mask, sport, sport_mask, family, plen_d, plen_s, proto, ifindex, user = (
        _SELECTOR.unpack_from(body, offset)
    )
    effective = family or family_hint or AF_INET
    if effective == AF_INET:
        daddr, saddr = daddr[:4], saddr[:4]
        longest = 32
    elif effective == AF_INET6:
        longest = 128
    else:
        raise WireError(f"selector of address family {family}")
    if plen_d > longest or plen_s > longest:
        raise WireError(f"selector with prefix lengths {plen_s} and {plen_d}")
    if dport or dport_mask or sport or sport_mask:
        dport, dport_mask, sport, sport_mask = struct.unpack(
            ">4H", _swap_ports.pack(dport, dport_mask, sport, sport_mask)
        )
    return Selector(family, daddr, plen_d, saddr, plen_s, proto, dport, dport_mask, sport, sport_mask, ifindex, user)


def _text(raw: bytes) -> str:
    """Decode a name in a field of fixed width. It ends with a zero byte."""
    name = _DECODED_NAMES.get(raw)
    if name is None:
        end = raw.find(0)
        if end < 0 or not raw[:end].isascii():
            raise WireError("an algorithm's name that is not text")
        name = raw[:end].decode("ascii")
        if len(_DECODED_NAMES) < 256:
            _DECODED_NAMES[raw] = name
    return name


_DECODED_NAMES: dict[bytes, str] = {}


def _algorithm(data: memoryview, kind: Attr) -> Algorithm:
    """Decode struct xfrm_algo: name, key length in bits, key."""
    name, bits = _ALGORITHM.unpack_from(_need(data, _ALGORITHM.size, kind))
    return Algorithm(_text(name), _key(data, _ALGORITHM.size, bits, kind))


def _algorithm_with_icv(data: memoryview, kind: Attr) -> Algorithm:
    """Decode struct xfrm_algo_auth or xfrm_algo_aead: name, key length and ICV length in bits, key."""
    name, bits, icv_bits = _ALGORITHM_ICV.unpack_from(_need(data, _ALGORITHM_ICV.size, kind))
    return Algorithm(_text(name), _key(data, _ALGORITHM_ICV.size, bits, kind), icv_bits)


def _key(data: memoryview, offset: int, bits: int, kind: Attr) -> bytes:
    size = (bits + 7) // 8
    if offset + size > len(data):
        raise WireError(f"attribute {kind.name} claims a key of {bits} bits, {8 * (len(data) - offset)} are there")
    return bytes(data[offset : offset + size])


def _mark(attrs: Attributes) -> Mark | None:
    data = attrs.get(Attr.MARK)
    if data is None:
        return None
    value, mask = _MARK_VALUE.unpack_from(_need(data, _MARK_VALUE.size, Attr.MARK))
    return Mark(value, mask) if value or mask else None


def _set_mark(attrs: Attributes) -> Mark | None:
    data = attrs.get(Attr.SET_MARK)
    if data is None:
        return None
    value = _u32(data, Attr.SET_MARK)
    mask = attrs.get(Attr.SET_MARK_MASK)
    return Mark(value, 0xFFFFFFFF if mask is None else _u32(mask, Attr.SET_MARK_MASK))


def _u32(data: memoryview, kind: Attr) -> int:
    return int(_U32.unpack_from(_need(data, 4, kind))[0])


def _optional_u32(attrs: Attributes, kind: Attr) -> int:
    data = attrs.get(kind)
    return 0 if data is None else _u32(data, kind)


def _encap(data: memoryview, family: int) -> Encap:
    _, sport, dport, oa = _ENCAP_TMPL.unpack_from(_need(data, _ENCAP_TMPL.size, Attr.ENCAP))
    return Encap(int.from_bytes(data[:2], sys.byteorder), sport, dport, oa[:4] if family == AF_INET else oa)


def _replay(attrs: Attributes, esn: bool) -> ReplayState | None:
    data = attrs.get(Attr.REPLAY_ESN_VAL)
    if data is not None:
        words, oseq, seq, oseq_hi, seq_hi, window = _REPLAY_ESN.unpack_from(
            _need(data, _REPLAY_ESN.size, Attr.REPLAY_ESN_VAL)
        )
        if words > MAX_BITMAP_WORDS or _REPLAY_ESN.size + 4 * words > len(data):
            raise WireError(f"attribute REPLAY_ESN_VAL claims {words} words of bitmap in {len(data)} bytes")
        bitmap = struct.unpack_from(f"={words}I", data, _REPLAY_ESN.size)
        return ReplayState(oseq | oseq_hi << 32, seq | seq_hi << 32, window, bitmap, esn)
    data = attrs.get(Attr.REPLAY_VAL)
    if data is None:
        return None
    oseq, seq, bits = _REPLAY.unpack_from(_need(data, _REPLAY.size, Attr.REPLAY_VAL))
    return ReplayState(oseq, seq, 0, (bits,), False)


def _offload(attrs: Attributes) -> OffloadDev | None:
    data = attrs.get(Attr.OFFLOAD_DEV)
    return None if data is None else OffloadDev(*_OFFLOAD.unpack_from(_need(data, _OFFLOAD.size, Attr.OFFLOAD_DEV)))


def _sa(body: memoryview, offset: int, attrs: Attributes) -> Sa:
    """Decode a struct xfrm_usersa_info at `offset`, with the attributes of its message."""
    rest = _SA_REST.unpack_from(body, offset + 56)
    daddr, spi, proto, saddr = rest[:4]
    dropped_window, dropped_replay, dropped_integrity, seq, reqid, family, mode, window, flags = rest[16:]
    if family == AF_INET:
        daddr, saddr = daddr[:4], saddr[:4]
    elif family != AF_INET6:
        raise WireError(f"address family {family}")
    crypt = auth = aead = comp = encap = direction = coaddr = None
    mark = replay = offload = set_mark = None
    extra_flags = if_id = tfcpad = last_used = 0
    if (data := attrs.get(_ALG_AEAD)) is not None:
        aead = _algorithm_with_icv(data, Attr.ALG_AEAD)
    if (data := attrs.get(_ALG_CRYPT)) is not None:
        crypt = _algorithm(data, Attr.ALG_CRYPT)
    if (data := attrs.get(_ALG_AUTH_TRUNC)) is not None:
        auth = _algorithm_with_icv(data, Attr.ALG_AUTH_TRUNC)
    elif (data := attrs.get(_ALG_AUTH)) is not None:
        auth = _algorithm(data, Attr.ALG_AUTH)
    if (data := attrs.get(_ALG_COMP)) is not None:
        comp = _algorithm(data, Attr.ALG_COMP)
    if (data := attrs.get(_ENCAP)) is not None:
        encap = _encap(data, family)
    if _MARK in attrs:
        mark = _mark(attrs)
    if _REPLAY_ESN_VAL in attrs or _REPLAY_VAL in attrs:
        replay = _replay(attrs, bool(flags & SaFlag.ESN))
        if replay is not None and _REPLAY_ESN_VAL in attrs:
            window = replay.window
    if _IF_ID in attrs:
        if_id = _u32(attrs[_IF_ID], Attr.IF_ID)
    if _SA_EXTRA_FLAGS in attrs:
        extra_flags = _u32(attrs[_SA_EXTRA_FLAGS], Attr.SA_EXTRA_FLAGS)
    if _SET_MARK in attrs:
        set_mark = _set_mark(attrs)
    if _TFCPAD in attrs:
        tfcpad = _u32(attrs[_TFCPAD], Attr.TFCPAD)
    if _OFFLOAD_DEV in attrs:
        offload = _offload(attrs)
    if (data := attrs.get(_COADDR)) is not None:
        coaddr = _address(bytes(_need(data, 16, Attr.COADDR)[:16]), family)
    if (data := attrs.get(_LASTUSED)) is not None:
        last_used = _U64.unpack_from(_need(data, 8, Attr.LASTUSED))[0]
    if (data := attrs.get(_SA_DIR)) is not None:
        direction = _need(data, 1, Attr.SA_DIR)[0]
    limits = rest[4:12]
    dropped = dropped_window or dropped_replay or dropped_integrity
    return Sa(
        daddr,
        saddr,
        int.from_bytes(spi, "big"),
        proto,
        family,
        mode,
        reqid,
        seq,
        window,
        flags,
        extra_flags,
        _selector(body, offset, family),
        NO_LIMITS if limits == _NO_LIMITS_RAW else Limits(*limits),
        Usage(*rest[12:16]),
        SaStats(dropped_window, dropped_replay, dropped_integrity) if dropped else _NO_STATS,
        crypt,
        auth,
        aead,
        comp,
        encap,
        mark,
        set_mark,
        if_id,
        direction or 0,
        replay,
        offload,
        coaddr,
        tfcpad,
        last_used,
    )


def _templates(attrs: Attributes) -> tuple[Template, ...]:
    data = attrs.get(Attr.TMPL)
    if data is None or not len(data):
        return ()
    if len(data) % _TEMPLATE.size:
        raise WireError(f"attribute TMPL has {len(data)} bytes, not a multiple of {_TEMPLATE.size}")
    return tuple(_template(fields) for fields in _TEMPLATE.iter_unpack(data))


def _template(fields: tuple[object, ...]) -> Template:
    daddr, spi, proto, family, saddr, reqid, mode, share, optional, aalgos, ealgos, calgos = fields
    assert isinstance(daddr, bytes)
    assert isinstance(saddr, bytes)
    assert isinstance(spi, bytes)
    assert isinstance(family, int)
    return Template(
        _address(daddr, family),
        _address(saddr, family),
        int.from_bytes(spi, "big"),
        *(proto, family, mode, reqid, share, bool(optional), aalgos, ealgos, calgos),  # type: ignore[arg-type]  # all are numbers
    )


def _policy(body: memoryview, offset: int, attrs: Attributes) -> Policy:
    """Decode a struct xfrm_userpolicy_info at `offset`, with the attributes of its message."""
    rest = _POLICY_REST.unpack_from(body, offset + 56)
    priority, index, direction, action, flags, share = rest[12:]
    templates = _templates(attrs)
    limits = rest[:8]
    return Policy(
        _selector(body, offset, templates[0].family if templates else 0),
        direction,
        action,
        priority,
        index,
        flags,
        share,
        _policy_type(attrs),
        templates,
        NO_LIMITS if limits == _NO_LIMITS_RAW else Limits(*limits),
        Usage(*rest[8:12]),
        _mark(attrs),
        _optional_u32(attrs, Attr.IF_ID),
        _offload(attrs),
    )


def _policy_type(attrs: Attributes) -> int:
    """Decode struct xfrm_userpolicy_type. Without the attribute the type is main."""
    data = attrs.get(Attr.POLICY_TYPE)
    return 0 if data is None else _need(data, 1, Attr.POLICY_TYPE)[0]


def _id(fields: tuple[bytes, bytes, int, int], mark: Mark | None) -> SaId:
    daddr, spi, family, proto = fields
    return SaId(_address(daddr, family), int.from_bytes(spi, "big"), proto, mark)


def _on_new_sa(body: memoryview, kind: int) -> Event:
    return SaAdded(_sa(body, 0, attributes(body, _SA_SIZE, Attr)), kind == MsgType.UPDSA)


def _on_del_sa(body: memoryview, kind: int) -> Event:
    attrs = attributes(body, _ID.size, Attr)
    inner = attrs.get(Attr.SA)
    sa = None if inner is None else _sa(_need(inner, _SA_SIZE, Attr.SA), 0, attrs)
    return SaDeleted(_id(_ID.unpack_from(body), _mark(attrs)), sa)


def _on_del_sa_id(body: memoryview) -> Event:
    return SaDeleted(_id(_ID.unpack_from(body), _mark(attributes(body, _ID.size, Attr))))


def _on_expire(body: memoryview, kind: int) -> Event:
    # struct xfrm_user_expire: the SA, one byte, padding to 8
    return SaExpired(_sa(body, 0, attributes(body, _SA_SIZE + 8, Attr)), bool(body[_SA_SIZE]))


def _on_flush_sa(body: memoryview, kind: int) -> Event:
    if not len(body):
        raise WireError("it has no protocol")
    return SasFlushed(body[0])


def _on_new_policy(body: memoryview, kind: int) -> Event:
    return PolicyAdded(_policy(body, 0, attributes(body, _POLICY_SIZE, Attr)), kind == MsgType.UPDPOLICY)


def _on_del_policy(body: memoryview, kind: int) -> Event:
    # the kernel sends only the id after a deletion by selector, and XFRMA_POLICY after one by index (xfrm_notify_policy)
    attrs = attributes(body, 56 + _POLICY_ID_REST.size, Attr)
    index, direction = _POLICY_ID_REST.unpack_from(body, 56)
    inner = attrs.get(Attr.POLICY)
    policy = None if inner is None else _policy(_need(inner, _POLICY_SIZE, Attr.POLICY), 0, attrs)
    if policy is not None:
        return PolicyDeleted(policy.id, index, policy)
    templates = _templates(attrs)
    selector = _selector(body, 0, templates[0].family if templates else 0)
    return PolicyDeleted(
        PolicyId(selector, direction, _mark(attrs), _optional_u32(attrs, Attr.IF_ID), _policy_type(attrs)), index
    )


def _on_policy_expire(body: memoryview, kind: int) -> Event:
    # struct xfrm_user_polexpire: the policy, one byte, padding to 8
    return PolicyExpired(_policy(body, 0, attributes(body, _POLICY_SIZE + 8, Attr)), bool(body[_POLICY_SIZE]))


def _on_flush_policy(body: memoryview, kind: int) -> Event:
    return PoliciesFlushed(_policy_type(attributes(body, 0, Attr)))


def _on_aevent(body: memoryview, kind: int) -> Event:
    attrs = attributes(body, _AEVENT.size, Attr)
    daddr, spi, family, proto, saddr, flags, reqid = _AEVENT.unpack_from(body)
    lifetime = attrs.get(Attr.LTIME_VAL)
    usage = None
    if lifetime is not None:
        usage = Usage(*_USAGE.unpack_from(_need(lifetime, _USAGE.size, Attr.LTIME_VAL)))
    sa_id = _id((daddr, spi, family, proto), _mark(attrs))
    return SaProgress(sa_id, _address(saddr, family), flags, reqid, usage, _replay(attrs, True))


def _on_acquire(body: memoryview, kind: int) -> Event:
    # struct xfrm_user_acquire: id, saddr, selector, policy, algorithm masks, seq
    attrs = attributes(body, 280, Attr)
    daddr, spi, proto = _ACQUIRE_ID.unpack_from(body)
    policy = _policy(body, 96, attrs)
    aalgos, ealgos, calgos, seq = _ACQUIRE_TAIL.unpack_from(body, 264)
    family = policy.templates[0].family if policy.templates else policy.selector.family
    sa_id = SaId(_address(daddr, family), int.from_bytes(spi, "big"), proto, _mark(attrs))
    saddr = _address(bytes(body[24:40]), family)
    return Acquired(sa_id, saddr, _selector(body, 40, family), policy, seq, aalgos, ealgos, calgos)


def _on_report(body: memoryview, kind: int) -> Event:
    # struct xfrm_user_report: one byte, padding to 4, selector
    return Reported(body[0], _selector(body, 4, 0)) if len(body) >= 60 else _cut_short()


def _cut_short() -> Event:
    raise WireError("it is cut short")


def _on_migrate(body: memoryview, kind: int) -> Event:
    attrs = attributes(body, 56 + _POLICY_ID_REST.size, Attr)
    _, direction = _POLICY_ID_REST.unpack_from(body, 56)
    data = attrs.get(Attr.MIGRATE)
    if data is None or len(data) % _MIGRATE.size:
        raise WireError("attribute MIGRATE is missing or of a wrong length")
    steps = []
    for fields in _MIGRATE.iter_unpack(data):
        old_daddr, old_saddr, new_daddr, new_saddr, proto, mode, _, reqid, old, new = fields
        steps.append(
            MigrateStep(
                _address(old_daddr, old),
                _address(old_saddr, old),
                _address(new_daddr, new),
                _address(new_saddr, new),
                *(proto, mode, reqid, old, new),
            )
        )
    policy_id = PolicyId(
        _selector(body, 0, 0), direction, _mark(attrs), _optional_u32(attrs, Attr.IF_ID), _policy_type(attrs)
    )
    return Migrated(policy_id, tuple(steps))


def _on_mapping(body: memoryview, kind: int) -> Event:
    daddr, spi, family, proto, reqid, old, new, old_sport, new_sport = _MAPPING.unpack_from(body)
    attrs = attributes(body, _MAPPING.size, Attr)
    return Mapped(
        _id((daddr, spi, family, proto), _mark(attrs)),
        reqid,
        _address(old, family),
        _address(new, family),
        socket.ntohs(old_sport),
        socket.ntohs(new_sport),
    )


def _on_sad_info(body: memoryview, kind: int) -> Event:
    # struct: u32 flags; attribute 1 is XFRMA_SAD_CNT
    count = attributes(body, 4, Attr).get(1)
    if count is None or len(count) < 4:
        raise WireError("the number of SAs is missing")
    return SadInfo(_U32.unpack_from(count)[0])


def _on_irrelevant(body: memoryview, kind: int) -> Event:
    return Irrelevant(kind)


_XFRM_DECODERS: dict[int, Callable[[memoryview, int], Event]] = {
    MsgType.NEWSA: _on_new_sa,
    MsgType.UPDSA: _on_new_sa,
    MsgType.DELSA: _on_del_sa,
    MsgType.EXPIRE: _on_expire,
    MsgType.FLUSHSA: _on_flush_sa,
    MsgType.NEWPOLICY: _on_new_policy,
    MsgType.UPDPOLICY: _on_new_policy,
    MsgType.DELPOLICY: _on_del_policy,
    MsgType.POLEXPIRE: _on_policy_expire,
    MsgType.FLUSHPOLICY: _on_flush_policy,
    MsgType.NEWAE: _on_aevent,
    MsgType.ACQUIRE: _on_acquire,
    MsgType.REPORT: _on_report,
    MsgType.MIGRATE: _on_migrate,
    MsgType.MAPPING: _on_mapping,
    MsgType.NEWSADINFO: _on_sad_info,
    MsgType.NEWSPDINFO: _on_irrelevant,
    MsgType.SETDEFAULT: _on_irrelevant,
    MsgType.GETDEFAULT: _on_irrelevant,
}
