"""Checks the stand-in's state at every request that it handles: no invariant may be broken for a moment.

`mark` records a moment in which the service was in sync. The service has no reason to give up anything that the kernel
has had without interruption since then.
"""

from __future__ import annotations

import itertools
from typing import Any

from support.build import LOCAL, LOCAL6
from support.charon import Charon
from support.equality import NO_HOSTS, compare, host_route, hosts_of
from support.faults import CHANGES, Trouble
from support.packet_path import decide
from support.spd import UDP, Packet
from vppipsec.kernel.route.model import KernelRoutes
from vppipsec.kernel.text import format_addr, format_selector
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey, tunnel_key_of_sa, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import PolicyAction, PolicyDir, Sa, SaId, Selector
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.policy_layers import Action
from vppipsec.sync.desired.tunnel import tag_of, translate
from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.ip import EnableIp6, RouteAddDel, TableAddDel
from vppipsec.vpp.api.ipsec import (
    IpsecItfDelete,
    SadEntryAdd,
    SadEntryDel,
    SadEntryUpdate,
    TunnelProtect,
    TunnelUnprotect,
)
from vppipsec.vpp.inventory import (
    FoundAbf,
    FoundAcl,
    FoundInterface,
    FoundSa,
    FoundTable,
    InterfaceIndexes,
    Inventory,
    Neighbor,
)
from vppipsec.vpp.ownership import FIB_SOURCE, INSTANCES, IP6_TAG, SAD_ID_FIRST, SAD_ID_LAST, TABLE_NUMBERS, TAG_PREFIX
from vppipsec.vpp.types import (
    LOCAL_INDEX,
    MAX_INBOUND_SAS,
    NO_INDEX,
    HostInterface,
    Path,
    Paths,
    Prefix,
    Protection,
    Route,
    Rule,
    SadFlag,
    SaSpec,
    weighted_paths,
)
from vppstandin.acl import AclRule
from vppstandin.fib import PATH_DROP, PATH_LOCAL
from vppstandin.server import StandIn
from vppstandin.world import SaEntry, World, address_of

_IPSEC = "IPSEC Tunnel"
_LOCALS = (LOCAL, LOCAL6)
_STEERING = {
    request.message for request in (RouteAddDel, AclAddReplace, AclDel, TableAddDel, AbfPolicyAddDel, AbfAttach)
}
Key = tuple[int, bytes]
"""An outbound SA for its peer: SPI and cipher key, whatever its addresses."""


def spec_of(actual: SaEntry) -> SaSpec:
    """Return an SA of the stand-in in the service's form."""
    entry, flags = actual.entry, actual.flags & ~SadFlag.IS_TUNNEL_V6
    return SaSpec(
        spi=entry.spi,
        src=address_of(entry.tunnel.src),
        dst=address_of(entry.tunnel.dst),
        crypto=CryptoAlg(int(entry.crypto_algorithm)),
        crypto_key=bytes(entry.crypto_key.data[: entry.crypto_key.length]),
        integ=IntegAlg(int(entry.integrity_algorithm)),
        integ_key=bytes(entry.integrity_key.data[: entry.integrity_key.length]),
        flags=flags,
        tunnel_flags=int(entry.tunnel.encap_decap_flags),
        salt=entry.salt,
        udp_src_port=actual.ports[0],
        udp_dst_port=actual.ports[1],
        replay_window=actual.window if flags & SadFlag.USE_ANTI_REPLAY else 0,
    )


def our_source(world: World) -> int:
    """Return the number of the service's FIB source, 0 where it does not exist yet."""
    return next((number for number, (name, _) in world.fib.sources.items() if name == FIB_SOURCE), 0)


def our_routes(world: World) -> dict[Route, Paths]:
    """Return the routes of the service's FIB source, each with its paths."""
    source = our_source(world)
    return {
        Route(Prefix(net.address, net.length), key.table_id): weighted_paths(
            Path({PATH_DROP: NO_INDEX, PATH_LOCAL: LOCAL_INDEX}.get(path.kind, path.sw_if_index), path.weight)
            for path in paths
        )
        for key, fib in world.fibs.items()
        if source
        for net, paths in fib.of_source(source)
    }


def our_acls(world: World) -> list[FoundAcl]:
    """Return the ACLs with the service's tags."""
    return [
        FoundAcl(number, acl.tag, tuple(map(_rule, acl.rules)))
        for number, acl in world.acls.items()
        if acl.tag.startswith(TAG_PREFIX)
    ]


def _rule(rule: AclRule) -> Rule:
    src, dst = (Prefix(net.address, net.length) for net in (rule.src, rule.dst))
    return Rule(bool(rule.is_permit), src, dst, rule.proto, rule.sports, rule.dports)


def our_sas(world: World) -> dict[int, SaSpec]:
    """Return the SAs of the service's range."""
    return {sad_id: spec_of(sa) for sad_id, sa in world.sas.items() if SAD_ID_FIRST <= sad_id <= SAD_ID_LAST}


def inventory_of(world: World) -> Inventory:
    """Return what the service holds in a stand-in, without asking it."""
    hosts = {pair.phy: HostInterface(pair.name, pair.vif_index) for pair in world.linux_cp.pairs.values()}
    interfaces = []
    for index, itf in world.interfaces.items():
        unfinished = not itf.tag and itf.instance in INSTANCES
        if itf.kind == _IPSEC and (itf.tag.startswith(TAG_PREFIX) or unfinished):
            found = world.protections.get(index)
            protection = None if found is None else Protection(found.out, tuple(found.ins))
            inputs = world.interface_acls[index].inputs if index in world.interface_acls else ()
            acl = inputs[0] if len(inputs) == 1 else None
            interfaces.append(
                FoundInterface(
                    itf.instance,
                    index,
                    itf.tag,
                    itf.unnumbered_from,
                    itf.up,
                    protection,
                    acl,
                    hosts.get(index),
                    itf.mtu[0],
                )
            )
    sas = tuple(FoundSa(sad_id, spec, world.sas[sad_id].stat_index) for sad_id, spec in our_sas(world).items())
    tables = tuple(
        FoundTable(key.table_id, key.is_ip6, fib.name)
        for key, fib in world.fibs.items()
        if key.table_id in TABLE_NUMBERS
    )
    policies = []
    for number, policy in world.abf_policies.items():
        (path,) = policy.paths
        assert path.table is not None
        attached = {
            key.sw_if_index: it.priority for key, it in world.abf_attachments.items() if key.policy_id == number
        }
        policies.append(FoundAbf(number, policy.acl_index, path.table.table_id, path.is_ip6, attached))
    return Inventory(
        tuple(interfaces),
        sas,
        tuple(our_acls(world)),
        our_routes(world),
        our_source(world),
        frozenset(),
        frozenset(),
        tables,
        tuple(policies),
        neighbors={
            Neighbor(key.sw_if_index, len(key.address) == 16): it.mac for key, it in world.neighbors.by_key.items()
        },
    )


def differences_in(world: World, model: KernelModel, wan: int, routes: KernelRoutes | None = None) -> list[str]:
    """Return how a stand-in differs from the state that the kernel's tables require; empty where it is equal.

    `routes` has the router's own addresses.
    """
    env = EnvironmentSnapshot(dict.fromkeys(_LOCALS, wan))
    desired = {key: translate(key, tunnel, env) for key, tunnel in model.tunnels.items()}
    interfaces = interfaces_of(world)
    hosts = NO_HOSTS if routes is None or not interfaces.taps else hosts_of(model, routes, {*map(host_route, _LOCALS)})
    return compare(desired, model, env, inventory_of(world), interfaces, hosts=hosts)


def interfaces_of(world: World) -> InterfaceIndexes:
    """Return the interfaces of a stand-in, without asking it."""
    taps = {pair.phy: pair.host for pair in world.linux_cp.pairs.values()}
    up = (index for index, itf in world.interfaces.items() if itf.up and itf.kind != _IPSEC)
    macs = {tap: world.interfaces[phy].mac for phy, tap in taps.items()}
    return InterfaceIndexes(tuple(index for index in up if index not in macs), frozenset(world.interfaces), taps, macs)


def lan_of(world: World) -> set[int]:
    """Return the interfaces that are up, without tunnels and linux-cp's taps."""
    return set(interfaces_of(world).up)


def targets(world: World, sw_if_index: int, packet: Packet) -> object:
    """Return the tunnel of a packet that an interface receives, NO_INDEX where it is dropped, or Action.BYPASS."""
    ip6 = len(packet.dst) == 16
    here = [
        (it.priority, world.abf_policies[key.policy_id])
        for key, it in world.abf_attachments.items()
        if key.sw_if_index == sw_if_index and it.is_ip6 == ip6
    ]
    routes = our_routes(world)
    attached = [
        (
            [_rule(rule) for rule in world.acls[policy.acl_index].rules],
            {route.prefix: index for route, index in routes.items() if route.table == policy.paths[0].table.table_id},
        )
        for _, policy in sorted(here, key=lambda it: it[0])
    ]
    main = {route.prefix: index for route, index in routes.items() if not route.table}
    return decide(attached, main, packet)


class Watch:
    """Records every violation in `complaints`, over all restarts of VPP and of the service."""

    def __init__(self, kernel: Charon, standin: StandIn, trouble: Trouble) -> None:
        self.complaints: list[str] = []
        self._kernel = kernel
        self._standin = standin
        self._trouble = trouble
        self._used: set[Key] = set()
        """Outbound SAs that protected an interface: packets may have left with them."""
        self._unknowable: set[Key] = set()
        """SAs that no running service can know: VPP held them before the service started."""
        self._added_before: set[Key] = set()
        """Outbound SAs that were added to VPP since the beginning, over all its restarts."""
        self._young: set[SaId] = set()
        """SAs whose addition was announced to the running service."""
        self._known: set[SaId] = set()
        self.service_runs = False
        self._stock_is_due = False
        self._specs: dict[int, SaSpec] = {}
        self._protections: dict[int, tuple[SaSpec, tuple[SaSpec, ...]]] = {}
        self._keys: dict[int, TunnelKey | None] = {}
        self._tags: dict[str, TunnelKey] = {}
        self.vpp_is_new()
        self.mark()
        kernel.on_change = self._kernel_changed
        kernel.on_asked = self._asked
        standin.watch = self._saw

    # Called by the test

    def mark(self) -> None:
        """Record that the service is in sync. From now on it must not give up anything without a reason."""
        self._selectors = self._wanted_selectors()
        self._whole = self._whole_groups()
        self._sas = set(self._kernel.sas)
        self._gone: set[SaId] = set()
        self._renewed: set[TunnelKey] = set()
        self._crowded: set[TunnelKey] = set()
        self._refused_before = self._trouble.refused
        self._kernel_changed()

    def vpp_is_new(self) -> None:
        """Record a restart of VPP: it holds other owners' objects, and nothing of the service."""
        self._covered: set[Selector] = set()
        """Selectors of policies whose packets this VPP once kept from leaving unencrypted."""
        self._specs, self._protections, self._keys = {}, {}, {}
        self._unknowable.clear()
        world = self._standin.world
        self._foreign = {index for index, itf in world.interfaces.items() if itf.kind == _IPSEC}
        self._foreign_state = self._foreign_of(world)

    def service_is_new(self) -> None:
        """Record a restart of the service: it knows only what VPP and the kernel report."""
        self._stock_is_due = True
        self._young.clear()
        self.service_runs = True

    # State of the kernel

    def _wanted_selectors(self) -> set[Selector]:
        return {
            policy.selector
            for policy in self._kernel.policies.values()
            if policy.direction == PolicyDir.OUT and policy.action == PolicyAction.ALLOW
        }

    def _whole_groups(self) -> set[TunnelKey]:
        """Return the tunnels that have a policy and a pair of SAs that VPP can carry."""
        next_hops: dict[TunnelKey, set[bool]] = {}
        for sa in self._kernel.sas.values():
            if sa.aead is not None or sa.crypt is None or sa.crypt.name == "cbc(aes)":
                next_hops.setdefault(tunnel_key_of_sa(sa), set()).add(sa.daddr in _LOCALS)
        wanted = {
            key
            for policy in self._kernel.policies.values()
            if policy.direction == PolicyDir.OUT
            for key in tunnel_keys_of_policy(policy)
        }
        return {key for key, found in next_hops.items() if len(found) == 2 and key in wanted}

    def _kernel_changed(self) -> None:
        self._selectors &= self._wanted_selectors()
        self._whole &= self._whole_groups()
        self._gone |= self._known - self._kernel.sas.keys()
        self._sas &= self._kernel.sas.keys()
        self._renewed |= {tunnel_key_of_sa(sa) for sa_id, sa in self._kernel.sas.items() if sa_id in self._gone}
        if self.service_runs and not self._kernel.silent:
            self._young |= self._kernel.sas.keys() - self._known
        self._known |= self._kernel.sas.keys()
        inbound: dict[TunnelKey, int] = {}
        for sa in self._kernel.sas.values():
            key = tunnel_key_of_sa(sa)
            self._tags[tag_of(key)] = key
            inbound[key] = inbound.get(key, 0) + (sa.daddr in _LOCALS)
        self._crowded |= {key for key, count in inbound.items() if count > MAX_INBOUND_SAS}

    def _uninterrupted(self, spec: SaSpec) -> bool:
        """Return whether the kernel had an SA without interruption."""
        return _id_of(spec) in self._sas

    def _asked(self, sa: Sa) -> None:
        same = [out for out, _ in self._protections.values() if (out.spi, out.dst) == (sa.spi, sa.daddr)]
        if any(bool(out.udp_src_port) == (sa.encap is not None) for out in same):
            self._complain(f"SA {sa.spi:#x} is to be rekeyed although VPP goes on with it")
        if sa.id in self._young and sa.spi not in {spi for spi, _ in self._added_before}:
            self._complain(f"SA {sa.spi:#x} is to be rekeyed although nobody has sent with it")

    # Requests to VPP

    def _saw(self, name: str, request: Any, retval: int) -> None:
        if name == "ipsec_sa_v5_dump" and self._stock_is_due:
            self._stock_is_due = False
            self._unknowable |= self._used - {_key(spec) for spec in self._specs.values()}
        if name not in CHANGES:
            return
        world = self._standin.world
        if retval:
            known_before = name == EnableIp6.message and retval == EnableIp6.already_done_retval
            if retval != self._trouble.answered and not known_before:
                self._complain(f"VPP refuses {name}: {retval}")
            return
        match name:
            case SadEntryAdd.message:
                self._added(request.entry.sad_id, world)
            case SadEntryUpdate.message:
                self._specs[request.sad_id] = spec_of(world.sas[request.sad_id])
            case SadEntryDel.message:
                self._deleted(request.id, world)
            case TunnelProtect.message:
                self._protected(request.tunnel, world)
            case TunnelUnprotect.message | IpsecItfDelete.message:
                self._unprotected(request.sw_if_index)
            case _ if name in _STEERING:
                self._look_for_clear_text(world)
        self._look_at(world)

    def _added(self, sad_id: int, world: World) -> None:
        spec = spec_of(world.sas[sad_id])
        if spec in self._specs.values():
            self._complain(f"{spec} is added although VPP holds it")
        if not spec.inbound and _key(spec) in self._used - self._unknowable:
            self._complain(f"{spec} is begun anew although packets may have left with it")
        self._specs[sad_id] = spec
        if not spec.inbound:
            self._added_before.add(_key(spec))

    def _deleted(self, sad_id: int, world: World) -> None:
        spec = self._specs.pop(sad_id, None)
        if spec is None or sad_id in world.sas:
            self._complain(f"SA {sad_id:#x} is deleted and stays, or was not there")
            return
        key = self._group_of(spec)
        right = self._uninterrupted(spec) and key in self._whole and key not in self._crowded
        if right and not any((other.spi, other.dst) == (spec.spi, spec.dst) for other in self._specs.values()):
            self._complain(f"{spec} is deleted although it is right")

    def _protected(self, tunnel: Any, world: World) -> None:
        index = tunnel.sw_if_index
        outbound = self._specs[tunnel.sa_out]
        inbound = tuple(self._specs[sad_id] for sad_id in tunnel.sa_in[: tunnel.n_sa_in])
        self._used.add(_key(outbound))
        key = self._keys[index] = self._tags.get(world.interfaces[index].tag.removesuffix(IP6_TAG))
        before = self._protections.get(index)
        if before is not None and key in self._whole:
            out_before, in_before = before
            lost = [
                spec for spec in in_before if self._uninterrupted(spec) and spec.spi not in {s.spi for s in inbound}
            ]
            if lost and key not in self._crowded:
                self._complain(f"the peer may still send on {lost}, which no longer protects")
            if self._uninterrupted(out_before) and self._uninterrupted(outbound) and self._older(outbound, out_before):
                self._complain(f"{out_before} gives way to an older SA, {outbound}")
        self._protections[index] = (outbound, inbound)

    def _unprotected(self, index: int) -> None:
        before = self._protections.pop(index, None)
        if before is None or self._keys.get(index) not in self._whole:
            return
        outbound, inbound = before
        same = self._uninterrupted(outbound) and any(map(self._uninterrupted, inbound))
        renewed = self._keys[index] in self._renewed  # with the same keys: it must be rekeyed first
        if same or not (renewed or self._trouble.refused > self._refused_before):
            self._complain(f"the tunnel of {outbound} loses its protection although it is wanted")

    def _look_for_clear_text(self, world: World) -> None:
        for selector in self._selectors:
            packet = Packet(_host_in(selector.saddr), _host_in(selector.daddr), selector.proto or UDP, 1000, 2000)
            if all(targets(world, index, packet) is not Action.BYPASS for index in lan_of(world)):
                self._covered.add(selector)
            elif selector in self._covered:
                self._complain(f"packets of {format_selector(selector)} leave in clear again")

    def _look_at(self, world: World) -> None:
        """Check the present state of VPP against all invariants."""
        for net, entry in world.fib.entries.items():
            for path in itertools.chain(*entry.paths.values()):
                if path.sw_if_index not in (NO_INDEX, *world.interfaces):
                    self._complain(f"the route {format_addr(net.address)}/{net.length} leads nowhere")
        if world.lost_references:
            self._complain(f"references of SAs {world.lost_references} are lost")
        tags = [itf.tag for itf in world.interfaces.values() if itf.tag]
        if len(set(tags)) != len(tags):
            self._complain("two interfaces have the same tag")
        if self._foreign_of(world) != self._foreign_state:
            self._complain("something of others was touched")
        if self._standin.death is not None:
            self._complain(f"VPP dies: {self._standin.death}")

    def _foreign_of(self, world: World) -> object:
        """Return other owners' objects: SAs, `ipsec` interfaces with their protections, routes into them."""
        sas = {sad_id: sa.references for sad_id, sa in world.sas.items() if not SAD_ID_FIRST <= sad_id <= SAD_ID_LAST}
        interfaces = [
            (itf, world.protections.get(itf.sw_if_index)) for itf in map(world.interfaces.get, self._foreign) if itf
        ]
        routes = [
            (net, source, path)
            for net, entry in world.fib.entries.items()
            for source, paths in entry.paths.items()
            for path in paths
            if path.sw_if_index in self._foreign
        ]
        return repr((sas, interfaces, routes))

    def _group_of(self, spec: SaSpec) -> TunnelKey | None:
        """Return the tunnel of an SA, as far as the kernel has it."""
        sa = self._kernel.sas.get(_id_of(spec))
        return None if sa is None else tunnel_key_of_sa(sa)

    def _older(self, one: SaSpec, other: SaSpec) -> bool:
        """Return whether the first of two SAs in the kernel is the older one."""
        order = list(self._kernel.sas)
        return order.index(_id_of(one)) < order.index(_id_of(other))

    def _complain(self, what: str) -> None:
        self.complaints.append(what)


def _host_in(net: bytes) -> bytes:
    return (int.from_bytes(net, "big") + 9).to_bytes(len(net), "big")


def _key(spec: SaSpec) -> Key:
    return spec.spi, spec.crypto_key


def _id_of(spec: SaSpec) -> SaId:
    return SaId(spec.dst, spec.spi, 50)
