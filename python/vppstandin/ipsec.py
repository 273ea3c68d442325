"""The stand-in's SAs, `ipsec` interfaces and protections (src/vnet/ipsec/ipsec_sa.c, ipsec_itf.c, ipsec_tun.c)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vppipsec.vpp.algorithms import AEAD_ALGS, CRYPTO_KEY_BYTES, CTR_ALGS, CryptoAlg, IntegAlg
from vppipsec.vpp.types import MAX_INBOUND_SAS, MAX_ITF_INSTANCE, SadFlag
from vppstandin.base import (
    ENTRY_ALREADY_EXISTS,
    INVALID_DST_ADDRESS,
    INVALID_PROTOCOL,
    INVALID_REGISTRATION,
    INVALID_SW_IF_INDEX,
    INVALID_VALUE,
    KEY_LENGTH,
    LIMIT_EXCEEDED,
    NO_INDEX,
    NO_SUCH_ENTRY,
    NO_SUCH_FIB,
    SAME_SRC_DST,
    UNIMPLEMENTED,
    Death,
    Pool,
    Refusal,
    ReplyFields,
    address_of,
    address_reply,
)
from vppstandin.fib import PATH_DROP, PATH_NORMAL, SOURCE_RECURSIVE, Fib, FibPath, Net, TableKey, Tables
from vppstandin.interfaces import Interfaces
from vppstandin.overlays import GRE_IPIP_KINDS

_IPPROTO_ESP, _AH = 50, 51
_ANY_WINDOW = (1 << 64) - 1


@dataclass(slots=True)
class SaEntry:
    """An SA with its references. `entry` is the entry of the message that added it."""

    entry: Any
    stat_index: int
    references: int = 1
    window: int = 0
    flags: int = 0
    ports: tuple[int, int] = (0, 0)

    @property
    def tracked(self) -> bool:
        """True if VPP tracks the route to the SA's remote endpoint: outbound SAs in tunnel mode."""
        return bool(self.flags & SadFlag.IS_TUNNEL) and not self.flags & SadFlag.IS_INBOUND


@dataclass(slots=True)
class ProtectionEntry:
    """The SAs that protect an interface, by `sad_id`."""

    out: int
    ins: list[int]


class Ipsec:
    """SAs by sad_id, protections by sw_if_index."""

    def __init__(self, tables: Tables, interfaces: Interfaces) -> None:
        self.sas: dict[int, SaEntry] = {}
        self.protections: dict[int, ProtectionEntry] = {}
        self.on_new_sa: Callable[[int], None] | None = None
        self._tables = tables
        self._interfaces = interfaces
        self._sa_pool = Pool()
        self._itf_order: dict[int, int] = {}
        self._itf_pool = Pool()
        self._protection_order: dict[int, int] = {}
        self._protection_pool = Pool()
        interfaces.on_remove.append(self._drop_protection)

    @property
    def lost_references(self) -> list[int]:
        """SAs with more references than their own and those of protections. VPP has leaked these; they are never freed."""
        used = [sad_id for protection in self.protections.values() for sad_id in (protection.out, *protection.ins)]
        return [sad_id for sad_id, sa in self.sas.items() if sa.references > 1 + used.count(sad_id)]

    def ipsec_sad_entry_add_v2(self, message: Any) -> ReplyFields:
        entry = message.entry
        crypto, integ = CryptoAlg(int(entry.crypto_algorithm)), IntegAlg(int(entry.integrity_algorithm))
        protocol = int(entry.protocol)
        flags = int(entry.flags)
        src, dst = address_of(entry.tunnel.src), address_of(entry.tunnel.dst)
        if flags & SadFlag.IS_TUNNEL and src == dst:
            raise Refusal(SAME_SRC_DST)
        if flags & SadFlag.IS_TUNNEL and len(src) != len(dst):
            raise Refusal(INVALID_PROTOCOL)
        if flags & SadFlag.IS_TUNNEL and TableKey(entry.tunnel.table_id, len(dst) == 16) not in self._tables.fibs:
            raise Refusal(NO_SUCH_FIB)
        if entry.sad_id in self.sas:
            raise Refusal(ENTRY_ALREADY_EXISTS)
        if protocol not in (_IPPROTO_ESP, _AH) or (protocol == _AH and integ == IntegAlg.NONE):
            raise Refusal(UNIMPLEMENTED)
        if protocol == _AH:
            crypto = CryptoAlg.NONE
        if not _has_pair(crypto, integ):
            raise Refusal(UNIMPLEMENTED)
        outbound_tunnel = flags & SadFlag.IS_TUNNEL and not flags & SadFlag.IS_INBOUND
        if entry.crypto_key.length not in (0, CRYPTO_KEY_BYTES[crypto]) and crypto != CryptoAlg.NONE:
            if not outbound_tunnel:
                raise Refusal(KEY_LENGTH)
            raise Death(
                f"ipsec_sad_entry_add_v2: {crypto.name} with a key of {entry.crypto_key.length} bytes:"
                " VPP 26.06 is hit by SIGSEGV in ipsec_sa_add_and_lock"
            )
        if flags & SadFlag.IS_TUNNEL and len(src) == 16:
            flags |= SadFlag.IS_TUNNEL_V6
        window = int(entry.anti_replay_window_size)
        rounded = 1 << (window - 1).bit_length() if flags & SadFlag.USE_ANTI_REPLAY and window > 64 else 64
        ports = (entry.udp_src_port or 4500, entry.udp_dst_port or 4500) if flags & SadFlag.UDP_ENCAP else (0, 0)
        present = SaEntry(entry, self._sa_pool.take(), window=rounded, flags=flags, ports=ports)
        self.sas[entry.sad_id] = present
        if self.on_new_sa is not None:
            self.on_new_sa(present.stat_index)
        if present.tracked:
            self._track(entry.tunnel)
        return {"stat_index": present.stat_index}

    def _track(self, tunnel: Any) -> None:
        """Add the FIB entry by which VPP tracks the route to a remote endpoint (tunnel_resolve, fib_entry_track)."""
        fib, dst, length = self._far_end(tunnel)
        self._tables.hold(fib.key)
        if Net(dst, length) in fib.entries:
            return
        cover = fib.lookup(dst, length, False)
        best = None if cover is None else fib.best(cover)
        path = FibPath(NO_INDEX, PATH_DROP, is_ip6=fib.key.is_ip6) if best is None else best[1][0]
        if path.kind == PATH_NORMAL and path.sw_if_index != NO_INDEX:
            path = FibPath(path.sw_if_index, PATH_NORMAL, dst, fib.key.is_ip6)
        fib.put(dst, length, SOURCE_RECURSIVE, path)

    def _untrack(self, tunnel: Any) -> None:
        fib, dst, length = self._far_end(tunnel)
        tracked = [self._far_end(sa.entry.tunnel)[:2] for sa in self.sas.values() if sa.tracked]
        if (fib, dst) not in tracked:
            fib.drop(dst, length, SOURCE_RECURSIVE)
        self._tables.release(fib.key)

    def _far_end(self, tunnel: Any) -> tuple[Fib, bytes, int]:
        """Return a tunnel's remote endpoint: its table, its address, and the address's number of bits."""
        dst = address_of(tunnel.dst)
        return self._tables.fibs[TableKey(tunnel.table_id, len(dst) == 16)], dst, 8 * len(dst)

    def ipsec_sad_entry_del(self, message: Any) -> ReplyFields:
        if message.id not in self.sas:
            raise Refusal(NO_SUCH_ENTRY)
        self._unlock(message.id)
        return {}

    def _unlock(self, sad_id: int) -> None:
        """Release a reference. The last one deletes the SA."""
        present = self.sas.get(sad_id)
        if present is None:
            return
        present.references -= 1
        if present.references <= 0:
            del self.sas[sad_id]
            self._sa_pool.give(present.stat_index)
            if present.tracked:
                self._untrack(present.entry.tunnel)

    def ipsec_sad_entry_update(self, message: Any) -> ReplyFields:
        present = self.sas.get(message.sad_id)
        if present is None:
            raise Refusal(NO_SUCH_ENTRY)
        if message.is_tun:
            if present.tracked:
                before = present.entry
                present.entry = before._replace(tunnel=message.tunnel)
                self._untrack(before.tunnel)
                self._track(message.tunnel)
            else:
                present.entry = present.entry._replace(tunnel=message.tunnel)
        if present.flags & SadFlag.UDP_ENCAP:
            present.ports = (message.udp_src_port or 4500, message.udp_dst_port or 4500)
        return {}

    def ipsec_sa_v5_dump(self, message: Any) -> list[ReplyFields]:
        return [self._sa_details(sad_id, sa) for sad_id, sa in self._sas_in_order()]

    def _sas_in_order(self) -> Iterator[tuple[int, SaEntry]]:
        yield from sorted(self.sas.items(), key=lambda item: item[1].stat_index)

    def _sa_details(self, sad_id: int, present: SaEntry) -> ReplyFields:
        entry = present.entry
        tunnel_mode = present.flags & SadFlag.IS_TUNNEL
        zero: ReplyFields = {"af": 0, "un": {"ip6": bytes(16)}}
        tunnel: ReplyFields = {"src": zero, "dst": zero, "sw_if_index": 0}
        if tunnel_mode:
            tunnel = {
                "src": address_reply(address_of(entry.tunnel.src)),
                "dst": address_reply(address_of(entry.tunnel.dst)),
                "encap_decap_flags": int(entry.tunnel.encap_decap_flags),
                "sw_if_index": 0,
            }
        replay = bool(present.flags & SadFlag.USE_ANTI_REPLAY)
        return {
            "entry": {
                "sad_id": sad_id,
                "spi": entry.spi,
                "protocol": int(entry.protocol),
                "crypto_algorithm": 0 if int(entry.protocol) == _AH else int(entry.crypto_algorithm),
                "crypto_key": {"length": entry.crypto_key.length, "data": entry.crypto_key.data},
                "integrity_algorithm": int(entry.integrity_algorithm),
                "integrity_key": {"length": entry.integrity_key.length, "data": entry.integrity_key.data},
                "flags": present.flags,
                "tunnel": tunnel,
                "salt": int.from_bytes(entry.salt.to_bytes(4, "big"), "little"),
                "udp_src_port": present.ports[0],
                "udp_dst_port": present.ports[1],
                "anti_replay_window_size": present.window if replay else 0,
            },
            "sw_if_index": NO_INDEX,
            "replay_window": _ANY_WINDOW if replay else 0,
            "stat_index": present.stat_index,
        }

    def ipsec_itf_create(self, message: Any) -> ReplyFields:
        wanted = message.itf.user_instance
        taken = {itf.instance for itf in self._interfaces.by_index.values() if itf.kind == "IPSEC Tunnel"}
        if wanted == NO_INDEX:
            wanted = next((n for n in range(MAX_ITF_INSTANCE) if n not in taken), MAX_ITF_INSTANCE)
        if wanted >= MAX_ITF_INSTANCE or wanted in taken:
            raise Refusal(INVALID_REGISTRATION)
        index = self._interfaces.add(f"ipsec{wanted}", "IPSEC Tunnel", instance=wanted)
        self._itf_order[index] = self._itf_pool.take()
        return {"sw_if_index": index}

    def ipsec_itf_delete(self, message: Any) -> ReplyFields:
        itf = self._interfaces.get(message.sw_if_index)
        if itf.kind != "IPSEC Tunnel":
            raise Refusal(INVALID_SW_IF_INDEX)
        if self._tables.received[itf.sw_if_index]:
            raise Death("routes have packets received on the interface that goes: the next one kills VPP")
        self._itf_pool.give(self._itf_order.pop(itf.sw_if_index))
        self._interfaces.remove(itf)
        return {}

    def ipsec_itf_dump(self, message: Any) -> list[ReplyFields]:
        return [
            {"itf": {"user_instance": self._interfaces.by_index[index].instance, "mode": 0, "sw_if_index": index}}
            for index in sorted(self._itf_order, key=self._itf_order.__getitem__)
            if message.sw_if_index in (NO_INDEX, index)
        ]

    def ipsec_tunnel_protect_update(self, message: Any) -> ReplyFields:
        index = message.tunnel.sw_if_index
        itf = self._interfaces.get(index)
        out, ins = message.tunnel.sa_out, list(message.tunnel.sa_in)
        if len(ins) > MAX_INBOUND_SAS:
            raise Refusal(LIMIT_EXCEEDED)
        for sad_id in (*ins, out):
            if sad_id not in self.sas:
                raise Refusal(INVALID_VALUE)  # VPP keeps the references that it has taken before
            self.sas[sad_id].references += 1
        if index not in self.protections:
            if itf.kind != "IPSEC Tunnel" and itf.kind not in GRE_IPIP_KINDS:
                raise Refusal(INVALID_SW_IF_INDEX)  # likewise
            self.protections[index] = ProtectionEntry(out, ins)
            self._protection_order[index] = self._protection_pool.take()
            if itf.kind == "IPSEC Tunnel" and not self.sas[out].flags & SadFlag.IS_TUNNEL:
                raise Refusal(INVALID_DST_ADDRESS)  # likewise, and an incomplete protection stays
        else:
            before = self.protections[index]
            self.protections[index] = ProtectionEntry(out, ins)
            for sad_id in (before.out, *before.ins):
                self._unlock(sad_id)
        return {}

    def ipsec_tunnel_protect_del(self, message: Any) -> ReplyFields:
        self._interfaces.get(message.sw_if_index)
        if not self._drop_protection(message.sw_if_index):
            raise Refusal(NO_SUCH_ENTRY)
        return {}

    def _drop_protection(self, index: int) -> bool:
        protection = self.protections.pop(index, None)
        if protection is None:
            return False
        self._protection_pool.give(self._protection_order.pop(index))
        for sad_id in (protection.out, *protection.ins):
            self._unlock(sad_id)
        return True

    def ipsec_tunnel_protect_dump(self, message: Any) -> list[ReplyFields]:
        return [
            {
                "tun": {
                    "sw_if_index": index,
                    "nh": address_reply(bytes(4)),
                    "sa_out": self.protections[index].out,
                    "n_sa_in": len(self.protections[index].ins),
                    "sa_in": self.protections[index].ins,
                }
            }
            for index in sorted(self._protection_order, key=self._protection_order.__getitem__)
            if message.sw_if_index in (NO_INDEX, index)
        ]


def _has_pair(crypto: CryptoAlg, integ: IntegAlg) -> bool:
    """Return whether VPP supports a cipher with an integrity algorithm (ipsec_sa_crypto_integ_map)."""
    if crypto in AEAD_ALGS:
        return integ == IntegAlg.NONE
    if crypto == CryptoAlg.DES_CBC:
        return integ == IntegAlg.NONE
    return not (crypto in CTR_ALGS and integ == IntegAlg.MD5_96)
