"""What the stand-in keeps and how it answers: each message's handler behaves as VPP 26.06's, whose file is named beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vppipsec.standin.fib import (
    NO_INDEX,
    PATH_DROP,
    PATH_LOCAL,
    PATH_NORMAL,
    SOURCE_API,
    SOURCE_INTERFACE,
    SOURCE_RECURSIVE,
    Fib,
    Net,
    Path,
    network,
)
from vppipsec.vpp.objects import (
    AEAD_ALGS,
    CRYPTO_KEY_BYTES,
    CTR_ALGS,
    MAX_INBOUND_SAS,
    MAX_ITF_INSTANCE,
    CryptoAlg,
    IntegAlg,
    SadFlag,
)

Reply = dict[str, Any]

INVALID_SW_IF_INDEX, NO_SUCH_FIB, NO_SUCH_ENTRY, INVALID_VALUE = -2, -3, -6, -7
UNIMPLEMENTED, INVALID_SW_IF_INDEX_2, INVALID_REGISTRATION = -9, -10, -31
NO_MATCHING_INTERFACE, INVALID_DST_ADDRESS, VALUE_EXIST = -54, -58, -81
IF_ALREADY_EXISTS, ENTRY_ALREADY_EXISTS, LIMIT_EXCEEDED = -105, -116, -162
SAME_SRC_DST, INVALID_PROTOCOL, KEY_LENGTH = -82, -153, -156
_ESP, _AH = 50, 51
_ANY_WINDOW = (1 << 64) - 1


class Death(Exception):
    """VPP would have died here; the text says why."""


class Refusal(Exception):
    """VPP answers with an error number."""

    def __init__(self, retval: int) -> None:
        super().__init__(retval)
        self.retval = retval


@dataclass(slots=True)
class Interface:
    """An interface of VPP."""

    sw_if_index: int
    name: str
    kind: str
    mac: bytes = bytes(6)
    instance: int = NO_INDEX
    tag: str = ""
    up: bool = False
    ip6: bool = False
    mtu: int = 9000
    link_mtu: int = 0
    lender: int | None = None
    addresses: list[tuple[bytes, int]] = field(default_factory=list)


@dataclass(slots=True)
class HeldSa:
    """An SA of VPP with its references; `entry` is the message's."""

    entry: Any
    stat_index: int
    references: int = 1
    window: int = 0
    flags: int = 0
    ports: tuple[int, int] = (0, 0)

    @property
    def tracked(self) -> bool:
        """True where VPP follows the route to the far end: outbound tunnel mode."""
        return bool(self.flags & SadFlag.IS_TUNNEL) and not self.flags & SadFlag.IS_INBOUND


@dataclass(slots=True)
class Protection:
    """SAs of an interface, by `sad_id`."""

    out: int
    ins: list[int]


class Pool:
    """Numbers as VPP's pools give them: the one freed last comes first."""

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give(self, number: int) -> None:
        self._free.append(number)


def address_of(value: Any) -> bytes:
    """Return the bytes of vl_api_address_t."""
    return bytes(value.un.ip4 if int(value.af) == 0 else value.un.ip6)


def address_reply(address: bytes) -> Reply:
    """Return vl_api_address_t for the serializer; of an IPv4 address VPP leaves the rest of the union zero."""
    return {"af": 0 if len(address) == 4 else 1, "un": {"ip6": address.ljust(16, b"\0")}}


class World:
    """All that the stand-in keeps. `handle` takes a request as vpp_papi unpacks it and returns what answers it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.interfaces: dict[int, Interface] = {0: Interface(0, "local0", "local", mtu=0)}
        self.sas: dict[int, HeldSa] = {}
        self.protections: dict[int, Protection] = {}
        self.fib = Fib()
        self.events: list[tuple[int, int, bool]] = []
        self.on_new_sa: Callable[[int], None] | None = None
        """Called with the stat_index of an SA that was added."""
        self._interface_pool = Pool(1)
        self._sa_pool = Pool()
        self._loopbacks = 0
        self._itf_order: dict[int, int] = {}
        self._itf_pool = Pool()
        self._protection_order: dict[int, int] = {}
        self._protection_pool = Pool()

    def handle(self, name: str, message: Any) -> Reply | list[Reply]:
        """Answer a request: a reply's fields, or the details of a dump. Raises Refusal and Death."""
        handler: Callable[[Any], Reply | list[Reply]] = getattr(self, f"_{name}")
        return handler(message)

    @property
    def lost_references(self) -> list[int]:
        """SAs that have more references than their own and their protection's: leaked, they never go."""
        used = [sad_id for protection in self.protections.values() for sad_id in (protection.out, *protection.ins)]
        return [sad_id for sad_id, sa in self.sas.items() if sa.references > 1 + used.count(sad_id)]

    # vlibmemory, vpp/api

    def _control_ping(self, message: Any) -> Reply:
        return {"vpe_pid": self.pid}

    def _show_version(self, message: Any) -> Reply:
        return {"program": "vpe", "version": "26.06-standin", "build_date": "", "build_directory": ""}

    # src/vnet/interface_api.c

    def _interface(self, index: int, error: int = INVALID_SW_IF_INDEX) -> Interface:
        found = self.interfaces.get(index)
        if found is None:
            raise Refusal(error)
        return found

    def _want_interface_events(self, message: Any) -> Reply:
        return {}

    def _sw_interface_dump(self, message: Any) -> list[Reply]:
        return [self._interface_details(itf) for _, itf in sorted(self.interfaces.items())]

    def _interface_details(self, itf: Interface) -> Reply:
        return {
            "sw_if_index": itf.sw_if_index,
            "sup_sw_if_index": itf.sw_if_index,
            "l2_address": itf.mac,
            "flags": 3 if itf.up else 0,
            "mtu": [itf.mtu, 0, 0, 0],
            "link_mtu": itf.link_mtu,
            "interface_name": itf.name,
            "interface_dev_type": itf.kind,
            "tag": itf.tag,
        }

    def _create_loopback_instance(self, message: Any) -> Reply:
        index = self._interface_pool.take()
        mac = bytes(message.mac_address)
        self.interfaces[index] = Interface(index, f"loop{self._loopbacks}", "Loopback", mac, link_mtu=9000)
        self._loopbacks += 1
        return {"sw_if_index": index}

    def _delete_loopback(self, message: Any) -> Reply:
        itf = self._interface(message.sw_if_index)
        if itf.kind != "Loopback":
            raise Refusal(INVALID_SW_IF_INDEX)
        self._remove_interface(itf)
        return {}

    def _remove_interface(self, itf: Interface) -> None:
        for address, length in itf.addresses:
            self._route_address(itf.sw_if_index, address, length, False)
        del self.interfaces[itf.sw_if_index]
        self._interface_pool.give(itf.sw_if_index)
        self.events.append((itf.sw_if_index, 0, True))

    def _sw_interface_set_flags(self, message: Any) -> Reply:
        itf = self._interface(message.sw_if_index)
        up = bool(int(message.flags) & 1)
        if up != itf.up:
            itf.up = up
            self.events.append((itf.sw_if_index, 3 if up else 0, False))
        return {}

    def _sw_interface_add_del_address(self, message: Any) -> Reply:
        itf = self._interface(message.sw_if_index)
        entry = (address_of(message.prefix.address), int(message.prefix.len))
        if message.is_add:
            if entry in itf.addresses:
                raise Refusal(IF_ALREADY_EXISTS)
            itf.addresses.append(entry)
            itf.ip6 |= len(entry[0]) == 16
        elif entry in itf.addresses:
            itf.addresses.remove(entry)
        else:
            raise Refusal(-60)  # ADDRESS_NOT_FOUND_FOR_INTERFACE
        self._route_address(itf.sw_if_index, *entry, bool(message.is_add))
        return {}

    def _route_address(self, index: int, address: bytes, length: int, is_add: bool) -> None:
        """Keep the routes that an address of an interface brings: to its network, and to itself."""
        whole = 8 * len(address)
        if not is_add:
            self.fib.drop(address, length, SOURCE_INTERFACE)
            self.fib.drop(address, whole, SOURCE_INTERFACE)
            return
        if length < whole:
            self.fib.put(address if whole == 32 else network(address, length), length, SOURCE_INTERFACE, Path(index))
        self.fib.put(address, whole, SOURCE_INTERFACE, Path(index, PATH_LOCAL, address))

    def _sw_interface_tag_add_del(self, message: Any) -> Reply:
        itf = self._interface(message.sw_if_index)
        itf.tag = message.tag if message.is_add else ""
        return {}

    def _sw_interface_set_unnumbered(self, message: Any) -> Reply:
        borrower = self._interface(message.unnumbered_sw_if_index)
        lender = self._interface(message.sw_if_index, INVALID_SW_IF_INDEX_2)
        borrower.lender = lender.sw_if_index if message.is_add else None
        return {}

    def _sw_interface_ip6_enable_disable(self, message: Any) -> Reply:
        itf = self._interface(message.sw_if_index)
        if itf.ip6 == bool(message.enable):
            raise Refusal(VALUE_EXIST if message.enable else NO_SUCH_ENTRY)
        itf.ip6 = bool(message.enable)
        return {}

    # src/vnet/ip/ip_api.c, src/vnet/fib/fib_api.c

    def _ip_address_dump(self, message: Any) -> list[Reply]:
        itf = self.interfaces.get(message.sw_if_index)
        if itf is None:
            return []
        source = itf
        if itf.lender is not None and itf.lender in self.interfaces:
            source = self.interfaces[itf.lender]
        return [
            {"sw_if_index": message.sw_if_index, "prefix": {"address": address_reply(address), "len": length}}
            for address, length in source.addresses
            if (len(address) == 16) == bool(message.is_ipv6)
        ]

    def _ip_unnumbered_dump(self, message: Any) -> list[Reply]:
        return [
            {"sw_if_index": index, "ip_sw_if_index": itf.lender}
            for index, itf in sorted(self.interfaces.items())
            if itf.lender is not None and message.sw_if_index in (NO_INDEX, index)
        ]

    def _fib_source_add(self, message: Any) -> Reply:
        return {"id": self.fib.add_source(message.src.name, message.src.priority)}

    def _fib_source_dump(self, message: Any) -> list[Reply]:
        return [
            {"src": {"priority": priority, "id": number, "name": name}}
            for number, (name, priority) in self.fib.sources.items()
        ]

    def _ip_route_add_del_v2(self, message: Any) -> Reply:
        route = message.route
        if route.table_id:
            raise Refusal(NO_SUCH_FIB)
        address, length = address_of(route.prefix.address), int(route.prefix.len)
        paths = [self._path(path) for path in route.paths]
        source = route.src or SOURCE_API
        if message.is_multipath or len(paths) != 1:
            raise Refusal(UNIMPLEMENTED)  # the stand-in has one path a route; VPP has many
        if not message.is_add:
            self.fib.drop(address, length, source)
            return {"stats_index": NO_INDEX}
        self.fib.put(network(address, length), length, source, paths[0])
        return {"stats_index": 0}

    def _path(self, path: Any) -> Path:
        """Decode a path as fib_api_path_decode does."""
        kind = int(path.type)
        if kind == PATH_DROP:
            return Path(NO_INDEX, PATH_DROP)
        if path.sw_if_index != NO_INDEX and path.sw_if_index not in self.interfaces:
            raise Refusal(NO_MATCHING_INTERFACE)
        size = 4 if int(path.proto) == 0 else 16
        return Path(path.sw_if_index, kind, bytes(path.nh.address.ip6)[:size])

    def _ip_route_lookup_v2(self, message: Any) -> Reply:
        if message.table_id:
            raise Refusal(NO_SUCH_FIB)
        net = self.fib.lookup(address_of(message.prefix.address), int(message.prefix.len), bool(message.exact))
        if net is None:
            raise Refusal(NO_SUCH_ENTRY)
        return {"route": self._route_reply(net)}

    def _ip_route_v2_dump(self, message: Any) -> list[Reply]:
        found = self.fib.of_source(message.src, bool(message.table.is_ip6))
        return [{"route": self._route_reply(net)} for net, _ in found]

    def _route_reply(self, net: Net) -> Reply:
        best = self.fib.best(net)
        assert best is not None
        source, path = best
        hop = path.next_hop.ljust(16, b"\0")
        shown = {
            "sw_if_index": path.sw_if_index,
            "weight": 1,
            "type": path.kind,
            "proto": 0 if len(net.address) == 4 else 1,
            "nh": {"address": {"ip6": hop}},
            "n_labels": 0,
            "label_stack": [{"is_uniform": 0, "label": 0, "ttl": 0, "exp": 0}] * 16,
        }
        prefix = {"address": address_reply(self.fib.entries[net].shown), "len": net.length}
        return {"table_id": 0, "stats_index": 0, "prefix": prefix, "n_paths": 1, "src": source, "paths": [shown]}

    # src/vnet/ipsec/ipsec_sa.c

    def _ipsec_sad_entry_add_v2(self, message: Any) -> Reply:
        entry = message.entry
        crypto, integ = CryptoAlg(int(entry.crypto_algorithm)), IntegAlg(int(entry.integrity_algorithm))
        protocol = int(entry.protocol)
        flags = int(entry.flags)
        src, dst = address_of(entry.tunnel.src), address_of(entry.tunnel.dst)
        if flags & SadFlag.IS_TUNNEL and src == dst:
            raise Refusal(SAME_SRC_DST)
        if flags & SadFlag.IS_TUNNEL and len(src) != len(dst):
            raise Refusal(INVALID_PROTOCOL)
        if entry.sad_id in self.sas:
            raise Refusal(ENTRY_ALREADY_EXISTS)
        if protocol not in (_ESP, _AH) or (protocol == _AH and integ == IntegAlg.NONE):
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
        if outbound_tunnel and entry.tunnel.table_id:
            raise Refusal(NO_SUCH_FIB)
        if flags & SadFlag.IS_TUNNEL and len(src) == 16:
            flags |= SadFlag.IS_TUNNEL_V6
        window = int(entry.anti_replay_window_size)
        rounded = 1 << (window - 1).bit_length() if flags & SadFlag.USE_ANTI_REPLAY and window > 64 else 64
        ports = (entry.udp_src_port or 4500, entry.udp_dst_port or 4500) if flags & SadFlag.UDP_ENCAP else (0, 0)
        held = HeldSa(entry, self._sa_pool.take(), window=rounded, flags=flags, ports=ports)
        self.sas[entry.sad_id] = held
        if self.on_new_sa is not None:
            self.on_new_sa(held.stat_index)
        if held.tracked:
            self._track(dst)
        return {"stat_index": held.stat_index}

    def _track(self, dst: bytes) -> None:
        """Add the entry by which VPP follows the route to an outbound SA's far end (tunnel_resolve, fib_entry_track)."""
        net = Net(dst, 8 * len(dst))
        if net in self.fib.entries:
            return
        cover = self.fib.lookup(dst, 8 * len(dst), False)
        best = None if cover is None else self.fib.best(cover)
        path = Path(NO_INDEX, PATH_DROP) if best is None else best[1]
        if path.kind == PATH_NORMAL and path.sw_if_index != NO_INDEX:
            path = Path(path.sw_if_index, PATH_NORMAL, dst)
        self.fib.put(dst, 8 * len(dst), SOURCE_RECURSIVE, path)

    def _untrack(self, held: HeldSa) -> None:
        dst = address_of(held.entry.tunnel.dst)
        if not any(sa.tracked and address_of(sa.entry.tunnel.dst) == dst for sa in self.sas.values()):
            self.fib.drop(dst, 8 * len(dst), SOURCE_RECURSIVE)

    def _ipsec_sad_entry_del(self, message: Any) -> Reply:
        if message.id not in self.sas:
            raise Refusal(NO_SUCH_ENTRY)
        self._unlock(message.id)
        return {}

    def _unlock(self, sad_id: int) -> None:
        """Drop a reference; the last one takes the SA with it."""
        held = self.sas.get(sad_id)
        if held is None:
            return
        held.references -= 1
        if held.references <= 0:
            del self.sas[sad_id]
            self._sa_pool.give(held.stat_index)
            if held.tracked:
                self._untrack(held)

    def _ipsec_sad_entry_update(self, message: Any) -> Reply:
        held = self.sas.get(message.sad_id)
        if held is None:
            raise Refusal(NO_SUCH_ENTRY)
        if message.is_tun:
            if held.tracked:
                before = held.entry
                held.entry = before._replace(tunnel=message.tunnel)
                self._untrack(HeldSa(before, held.stat_index, flags=held.flags))
                self._track(address_of(message.tunnel.dst))
            else:
                held.entry = held.entry._replace(tunnel=message.tunnel)
        if held.flags & SadFlag.UDP_ENCAP:
            held.ports = (message.udp_src_port or 4500, message.udp_dst_port or 4500)
        return {}

    def _ipsec_sa_v5_dump(self, message: Any) -> list[Reply]:
        return [self._sa_details(sad_id, sa) for sad_id, sa in self._sas_in_order()]

    def _sas_in_order(self) -> Iterator[tuple[int, HeldSa]]:
        yield from sorted(self.sas.items(), key=lambda item: item[1].stat_index)

    def _sa_details(self, sad_id: int, held: HeldSa) -> Reply:
        entry = held.entry
        tunnel_mode = held.flags & SadFlag.IS_TUNNEL
        zero: Reply = {"af": 0, "un": {"ip6": bytes(16)}}
        tunnel: Reply = {"src": zero, "dst": zero}
        if tunnel_mode:
            tunnel = {
                "src": address_reply(address_of(entry.tunnel.src)),
                "dst": address_reply(address_of(entry.tunnel.dst)),
                "encap_decap_flags": int(entry.tunnel.encap_decap_flags),
            }
        replay = bool(held.flags & SadFlag.USE_ANTI_REPLAY)
        return {
            "entry": {
                "sad_id": sad_id,
                "spi": entry.spi,
                "protocol": int(entry.protocol),
                "crypto_algorithm": 0 if int(entry.protocol) == _AH else int(entry.crypto_algorithm),
                "crypto_key": {"length": entry.crypto_key.length, "data": entry.crypto_key.data},
                "integrity_algorithm": int(entry.integrity_algorithm),
                "integrity_key": {"length": entry.integrity_key.length, "data": entry.integrity_key.data},
                "flags": held.flags,
                "tunnel": tunnel,
                "salt": int.from_bytes(entry.salt.to_bytes(4, "big"), "little"),
                "udp_src_port": held.ports[0],
                "udp_dst_port": held.ports[1],
                "anti_replay_window_size": held.window if replay else 0,
            },
            "sw_if_index": NO_INDEX,
            "replay_window": _ANY_WINDOW if replay else 0,
            "stat_index": held.stat_index,
        }

    # src/vnet/ipsec/ipsec_itf.c

    def _ipsec_itf_create(self, message: Any) -> Reply:
        wanted = message.itf.user_instance
        taken = {itf.instance for itf in self.interfaces.values() if itf.kind == "IPSEC Tunnel"}
        if wanted == NO_INDEX:
            wanted = next((n for n in range(MAX_ITF_INSTANCE) if n not in taken), MAX_ITF_INSTANCE)
        if wanted >= MAX_ITF_INSTANCE or wanted in taken:
            raise Refusal(INVALID_REGISTRATION)
        index = self._interface_pool.take()
        self.interfaces[index] = Interface(index, f"ipsec{wanted}", "IPSEC Tunnel", instance=wanted)
        self._itf_order[index] = self._itf_pool.take()
        return {"sw_if_index": index}

    def _ipsec_itf_delete(self, message: Any) -> Reply:
        itf = self._interface(message.sw_if_index)
        if itf.kind != "IPSEC Tunnel":
            raise Refusal(INVALID_SW_IF_INDEX)
        self._drop_protection(itf.sw_if_index)
        self._itf_pool.give(self._itf_order.pop(itf.sw_if_index))
        self._remove_interface(itf)
        return {}

    def _ipsec_itf_dump(self, message: Any) -> list[Reply]:
        return [
            {"itf": {"user_instance": self.interfaces[index].instance, "mode": 0, "sw_if_index": index}}
            for index in sorted(self._itf_order, key=self._itf_order.__getitem__)
            if message.sw_if_index in (NO_INDEX, index)
        ]

    # src/vnet/ipsec/ipsec_tun.c

    def _ipsec_tunnel_protect_update(self, message: Any) -> Reply:
        index = message.tunnel.sw_if_index
        itf = self._interface(index)
        out, ins = message.tunnel.sa_out, list(message.tunnel.sa_in)
        if len(ins) > MAX_INBOUND_SAS:
            raise Refusal(LIMIT_EXCEEDED)
        for sad_id in (*ins, out):
            if sad_id not in self.sas:
                raise Refusal(INVALID_VALUE)  # those looked up before stay locked
            self.sas[sad_id].references += 1
        if index not in self.protections:
            if itf.kind != "IPSEC Tunnel":
                raise Refusal(INVALID_SW_IF_INDEX)  # likewise
            self.protections[index] = Protection(out, ins)
            self._protection_order[index] = self._protection_pool.take()
            if not self.sas[out].flags & SadFlag.IS_TUNNEL:
                raise Refusal(INVALID_DST_ADDRESS)  # likewise, and a half-made protection stays
        else:
            before = self.protections[index]
            self.protections[index] = Protection(out, ins)
            for sad_id in (before.out, *before.ins):
                self._unlock(sad_id)
        return {}

    def _ipsec_tunnel_protect_del(self, message: Any) -> Reply:
        self._interface(message.sw_if_index)
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

    def _ipsec_tunnel_protect_dump(self, message: Any) -> list[Reply]:
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
    """Tell whether VPP has a cipher with an integrity algorithm (ipsec_sa_crypto_integ_map)."""
    if crypto in AEAD_ALGS:
        return integ == IntegAlg.NONE
    if crypto == CryptoAlg.DES_CBC:
        return integ == IntegAlg.NONE
    return not (crypto in CTR_ALGS and integ == IntegAlg.MD5_96)
