"""What translate makes of the kernel's SAs and policies."""

from dataclasses import replace

import pytest

from support.build import (
    CBC,
    ENV,
    GCM,
    GCM128,
    LOCAL,
    LOCAL6,
    REMOTE,
    REMOTE6,
    SHA256,
    WAN,
    make_policy,
    make_sa,
    sa_in,
    sa_out,
)
from vppipsec.kernel.xfrm.events import PolicyAdded, SaAdded
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import (
    Algorithm,
    Encap,
    Mark,
    Policy,
    PolicyDir,
    Sa,
    SaDir,
    SaExtraFlag,
    SaFlag,
    Template,
)
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.sa import vpp_replay_window
from vppipsec.sync.desired.state import OffloadStatus, Translation
from vppipsec.sync.desired.tunnel import tag_of, translate
from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.guard import check_sa
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule, SadFlag, TunnelFlag


def desired_of(*items: Sa | Policy, env: EnvironmentSnapshot = ENV) -> Translation:
    """Translate the one group that these SAs and policies make."""
    model = KernelModel()
    for item in items:
        model.apply(SaAdded(item) if isinstance(item, Sa) else PolicyAdded(item))
    ((key, tunnel),) = model.tunnels.items()
    return translate(key, tunnel, env)


def reasons(desired: Translation) -> set[tuple[OffloadStatus, str]]:
    return {(decision.status, decision.reason) for decision in desired.decisions.values()}


def test_pair_with_policy_makes_a_tunnel():
    desired = desired_of(sa_in(0x2001), sa_out(0x1001), make_policy())
    tunnel = desired.tunnel
    assert tunnel is not None
    assert [spec.spi for spec in tunnel.outbound] == [0x1001]
    assert [spec.spi for spec in tunnel.inbound] == [0x2001]
    assert tunnel.unnumbered_from == WAN
    assert not tunnel.ip6
    assert {decision.status for decision in desired.decisions.values()} == {OffloadStatus.OFFLOADED}


def test_gcm_salt_is_the_last_four_key_bytes_read_big_endian():
    spec = desired_of(sa_in(1), sa_out(2), make_policy()).tunnel.outbound[0]
    assert spec.salt == 0xDEADBEEF
    assert spec.crypto_key == bytes(range(32))
    assert spec.crypto is CryptoAlg.AES_GCM_256


def hmac(name: str, key_bytes: int, icv_bits: int) -> Algorithm:
    return Algorithm(name, bytes(range(key_bytes)), icv_bits)


@pytest.mark.parametrize(
    ("change", "crypto", "integ"),
    [
        ({"aead": GCM128}, CryptoAlg.AES_GCM_128, IntegAlg.NONE),
        ({"aead": Algorithm("rfc4106(gcm(aes))", bytes(28), 128)}, CryptoAlg.AES_GCM_192, IntegAlg.NONE),
        (
            {"aead": Algorithm("rfc7539esp(chacha20,poly1305)", bytes(36), 128)},
            CryptoAlg.CHACHA20_POLY1305,
            IntegAlg.NONE,
        ),
        ({"aead": Algorithm("rfc4543(gcm(aes))", bytes(20), 128)}, CryptoAlg.AES_NULL_GMAC_128, IntegAlg.NONE),
        ({"aead": None, "crypt": CBC, "auth": SHA256}, CryptoAlg.AES_CBC_128, IntegAlg.SHA_256_128),
        (
            {"aead": None, "crypt": CBC, "auth": hmac("hmac(sha256)", 32, 96)},
            CryptoAlg.AES_CBC_128,
            IntegAlg.SHA_256_96,
        ),
        ({"aead": None, "crypt": CBC, "auth": hmac("hmac(sha1)", 20, 0)}, CryptoAlg.AES_CBC_128, IntegAlg.SHA1_96),
        ({"aead": None, "crypt": CBC, "auth": hmac("hmac(md5)", 16, 96)}, CryptoAlg.AES_CBC_128, IntegAlg.MD5_96),
        (
            {"aead": None, "crypt": Algorithm("cbc(aes)", bytes(24)), "auth": hmac("hmac(sha384)", 48, 192)},
            CryptoAlg.AES_CBC_192,
            IntegAlg.SHA_384_192,
        ),
        (
            {"aead": None, "crypt": Algorithm("cbc(aes)", bytes(32)), "auth": hmac("hmac(sha512)", 64, 256)},
            CryptoAlg.AES_CBC_256,
            IntegAlg.SHA_512_256,
        ),
        ({"aead": None, "crypt": Algorithm("rfc3686(ctr(aes))", bytes(20)), "auth": SHA256}, CryptoAlg.AES_CTR_128, 4),
        ({"aead": None, "crypt": Algorithm("cbc(des3_ede)", bytes(24)), "auth": SHA256}, CryptoAlg.TDES_CBC, 4),
        ({"aead": None, "crypt": Algorithm("ecb(cipher_null)", b""), "auth": SHA256}, CryptoAlg.NONE, 4),
    ],
)
def test_every_algorithm_of_the_design_is_carried(change, crypto, integ):
    tunnel = desired_of(sa_in(1, **change), sa_out(2, **change), make_policy()).tunnel
    assert tunnel is not None
    for spec in (*tunnel.outbound, *tunnel.inbound):
        assert (spec.crypto, spec.integ) == (crypto, integ)
        check_sa(spec)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"aead": Algorithm("rfc4106(gcm(aes))", bytes(36), 96)},
            "rfc4106(gcm(aes)) with an ICV of 96 bits: VPP has 128 only",
        ),
        ({"aead": Algorithm("rfc4106(gcm(aes))", bytes(21), 128)}, "rfc4106(gcm(aes)) with a key of 168 bits"),
        ({"aead": Algorithm("rfc4309(ccm(aes))", bytes(19), 128)}, "VPP has no rfc4309(ccm(aes))"),
        ({"aead": None, "crypt": Algorithm("cbc(camellia)", bytes(16)), "auth": SHA256}, "VPP has no cbc(camellia)"),
        ({"aead": None, "crypt": Algorithm("cbc(aes)", bytes(15)), "auth": SHA256}, "cbc(aes) with a key of 120 bits"),
        ({"aead": None, "crypt": CBC}, "cbc(aes) without integrity"),
        ({"aead": None, "crypt": CBC, "auth": Algorithm("digest_null", b"")}, "cbc(aes) without integrity"),
        ({"aead": None, "crypt": Algorithm("ecb(cipher_null)", b"")}, "ecb(cipher_null) without integrity"),
        (
            {"aead": None, "crypt": CBC, "auth": hmac("hmac(sha512)", 64, 128)},
            "VPP has no hmac(sha512) with an ICV of 128 bits",
        ),
        ({"aead": None, "crypt": CBC, "auth": hmac("hmac(sha256)", 31, 128)}, "hmac(sha256) with a key of 248 bits"),
        (
            {"aead": None, "crypt": Algorithm("rfc3686(ctr(aes))", bytes(20)), "auth": hmac("hmac(md5)", 16, 96)},
            "VPP has no rfc3686(ctr(aes)) with hmac(md5)",
        ),
        ({"proto": 51, "aead": None, "auth": SHA256}, "AH: only ESP is carried"),
        ({"mark": Mark(0x11, 0xFF)}, "a firewall mark: packets in VPP carry none"),
        ({"tfcpad": 1400}, "traffic flow confidentiality padding"),
        ({"encap": Encap(1, 4500, 4500, bytes(4))}, "encapsulation of kind 1: only ESP in UDP (RFC 3948) is carried"),
        ({"encap": Encap(2, 0, 4500, bytes(4))}, "UDP encapsulation with port 0"),
        ({"spi": 0}, "an SPI of 0"),
        ({"direction": SaDir.IN}, "its direction contradicts its endpoints"),
    ],
)
def test_what_vpp_cannot_carry_is_listed_with_its_reason(change, reason):
    desired = desired_of(sa_in(1), sa_out(2)._replace(**change), make_policy())
    assert desired.tunnel is None
    assert (OffloadStatus.UNSUPPORTED, reason) in reasons(desired)
    assert (OffloadStatus.UNSUPPORTED, f"its outbound counterpart: {reason}") in reasons(desired)


def test_window_that_no_kernel_has_is_not_asked_of_vpp():
    desired = desired_of(sa_in(1, replay_window=4097), sa_in(2, replay_window=4096), sa_out(3), make_policy())
    assert [spec.spi for spec in desired.tunnel.inbound] == [2]
    assert (OffloadStatus.UNSUPPORTED, "an anti-replay window of 4,097 packets: VPP is given 4,096 at most") in reasons(
        desired
    )


def test_transport_mode_stays_with_the_kernel():
    template = make_policy().templates[0]
    policy = make_policy(src="192.0.2.1/32", dst="192.0.2.2/32", templates=(replace(template, mode=0),))
    desired = desired_of(sa_in(1, mode=0), sa_out(2, mode=0), policy)
    assert desired.tunnel is None
    reason = "transport mode: VPP has no gre or ipip interface between these hosts that its policy is for"
    assert (OffloadStatus.UNSUPPORTED, reason) in reasons(desired)


def test_cipher_that_this_vpp_lacks_is_unsupported():
    env = replace(ENV, ciphers=frozenset(CryptoAlg) - {CryptoAlg.AES_GCM_256})
    desired = desired_of(sa_in(1), sa_out(2), make_policy(), env=env)
    assert reasons(desired) == {(OffloadStatus.UNSUPPORTED, "this VPP has no AES-GCM-256")}


def test_tunnel_whose_ends_are_not_on_vpp_stays_with_the_kernel():
    desired = desired_of(sa_in(1), sa_out(2), make_policy(), env=EnvironmentSnapshot({}))
    assert reasons(desired) == {(OffloadStatus.UNSUPPORTED, "neither 192.0.2.1 nor 192.0.2.2 is on a VPP interface")}


def test_tunnel_whose_peer_vpp_does_not_reach_stays_with_the_kernel():
    desired = desired_of(sa_in(1), sa_out(2), make_policy(), env=replace(ENV, unreachable=frozenset({REMOTE})))
    assert reasons(desired) == {(OffloadStatus.UNSUPPORTED, "VPP has no route to 192.0.2.2")}


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ((sa_in(1), sa_out(2)), "no policy uses it"),
        ((sa_in(1), make_policy()), "there is no outbound SA yet"),
        ((sa_out(2), make_policy()), "there is no inbound SA yet"),
    ],
)
def test_incomplete_tunnel_is_pending(items, reason):
    desired = desired_of(*items)
    assert desired.tunnel is None
    assert reasons(desired) == {(OffloadStatus.PENDING, reason)}


def test_newest_outbound_sa_comes_last_and_older_ones_stay():
    tunnel = desired_of(sa_out(1), sa_out(2), sa_in(3), make_policy()).tunnel
    assert [spec.spi for spec in tunnel.outbound] == [1, 2]


def test_four_newest_inbound_sas_are_used_and_the_rest_reported():
    desired = desired_of(*(sa_in(spi) for spi in range(1, 7)), sa_out(9), make_policy())
    assert [spec.spi for spec in desired.tunnel.inbound] == [3, 4, 5, 6]
    surplus = [
        sa_id.spi for sa_id, decision in desired.decisions.items() if decision.status is OffloadStatus.UNSUPPORTED
    ]
    assert surplus == [1, 2]
    assert "4 inbound SAs" in next(
        v.reason for v in desired.decisions.values() if v.status is OffloadStatus.UNSUPPORTED
    )


def test_natt_ports_esn_and_windows_are_translated():
    encap = Encap(2, 4501, 4500, bytes(4))
    flags = SaFlag.ESN | SaFlag.AF_UNSPEC
    tunnel = desired_of(
        sa_in(1, encap=encap, flags=flags, replay_window=1000), sa_out(2, encap=encap, flags=flags), make_policy()
    ).tunnel
    inbound, outbound = tunnel.inbound[0], tunnel.outbound[0]
    assert (inbound.udp_src_port, inbound.udp_dst_port) == (4501, 4500)
    assert inbound.flags == (
        SadFlag.IS_TUNNEL | SadFlag.USE_ESN | SadFlag.UDP_ENCAP | SadFlag.IS_INBOUND | SadFlag.USE_ANTI_REPLAY
    )
    assert inbound.replay_window == 1024
    assert outbound.flags == SadFlag.IS_TUNNEL | SadFlag.USE_ESN | SadFlag.UDP_ENCAP
    assert outbound.replay_window == 0


@pytest.mark.parametrize(("kernel", "vpp"), [(1, 64), (32, 64), (64, 64), (65, 128), (1024, 1024), (4096, 4096)])
def test_window_is_rounded_up_to_what_vpp_has(kernel, vpp):
    assert vpp_replay_window(kernel) == vpp


def test_no_window_means_no_anti_replay():
    inbound = desired_of(sa_in(1, replay_window=0), sa_out(2), make_policy()).tunnel.inbound[0]
    assert not inbound.flags & SadFlag.USE_ANTI_REPLAY
    assert inbound.replay_window == 0


def test_dscp_ecn_and_df_follow_the_flags():
    plain = desired_of(sa_in(1), sa_out(2), make_policy()).tunnel
    assert plain.outbound[0].tunnel_flags == (TunnelFlag.ENCAP_COPY_DSCP | TunnelFlag.ENCAP_COPY_ECN)
    assert plain.inbound[0].tunnel_flags == TunnelFlag.DECAP_COPY_ECN
    flags = SaFlag.NOECN | SaFlag.NOPMTUDISC
    none = desired_of(
        sa_in(1, flags=flags), sa_out(2, flags=flags, extra_flags=SaExtraFlag.DONT_ENCAP_DSCP), make_policy()
    ).tunnel
    assert none.outbound[0].tunnel_flags == TunnelFlag.NONE
    assert none.inbound[0].tunnel_flags == TunnelFlag.NONE


def test_ipv6_endpoints_and_ipv6_inside():
    ends = (LOCAL6, REMOTE6)
    policy = make_policy(src="fd01::/64", dst="fd02::/64", ends=ends)
    desired = desired_of(make_sa(1, REMOTE6, LOCAL6), make_sa(2, LOCAL6, REMOTE6), policy)
    assert desired.tunnel.ip6
    assert desired.tunnel.outbound[0].dst == REMOTE6


def test_policies_with_an_if_id_make_a_tunnel():
    policies = [make_policy(d, "0.0.0.0/0", "0.0.0.0/0", if_id=42) for d in (PolicyDir.OUT, PolicyDir.IN)]
    desired = desired_of(sa_in(1, if_id=42), sa_out(2, if_id=42), *policies)
    assert desired.tunnel is not None


OF_A_VTI = (sa_in(1, if_id=7), sa_out(2, if_id=7), make_policy(if_id=7))
IN_RED = replace(ENV, vtis={7: 10, 8: 0})
RED = frozenset({(10, False), (10, True)})


@pytest.mark.parametrize(
    ("env", "table"),
    [(ENV, 0), (replace(ENV, vtis={7: 0}), 0), (replace(IN_RED, tables=RED), 10)],
    ids=["VTIs not followed", "in no VRF", "in a VRF"],
)
def test_what_comes_out_of_a_vti_is_for_the_table_of_its_vrf(env, table):
    assert desired_of(*OF_A_VTI, env=env).tunnel.table == table


def test_what_comes_out_of_a_tunnel_without_a_vti_is_for_the_main_table():
    assert desired_of(sa_in(1), sa_out(2), make_policy(), env=IN_RED).tunnel.table == 0


def test_vrf_tunnel_is_offloaded_once_vpp_has_its_tables():
    inside6 = (*OF_A_VTI, make_policy(src="::/0", dst="::/0", if_id=7))
    four, both = (
        "VPP has no IPv4 table 10, the one of its VTI's VRF",
        "VPP has no IPv6 table 10, the one of its VTI's VRF",
    )
    only6, only4 = (replace(IN_RED, tables=frozenset({(10, ip6)})) for ip6 in (True, False))
    for items, env, reason in ((OF_A_VTI, IN_RED, four), (OF_A_VTI, only6, four), (inside6, only4, both)):
        desired = desired_of(*items, env=env)
        assert desired.tunnel is None
        assert reasons(desired) == {(OffloadStatus.UNSUPPORTED, reason)}
    assert desired_of(*OF_A_VTI, env=only4).tunnel.table == 10
    assert desired_of(*inside6, env=replace(IN_RED, tables=RED)).tunnel.table == 10


def test_tunnel_whose_vti_is_not_there_is_in_no_table():
    desired = desired_of(*OF_A_VTI, env=replace(ENV, vtis={8: 0}))
    assert desired.tunnel is None
    assert reasons(desired) == {(OffloadStatus.PENDING, "there is no interface with if_id 7")}


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (
            make_policy(selector=replace(make_policy().selector, proto=132, dport=53, dport_mask=0xFFFF)),
            "its policy names ports of SCTP: VPP knows those of TCP and UDP",
        ),
        (make_policy(mark=Mark(1, 1)), "its policy matches a firewall mark: packets in VPP carry none"),
        (make_policy(type=1), "its policy asks for more than one transformation"),
    ],
)
def test_tunnel_of_a_policy_that_vpp_cannot_follow_is_unsupported(policy, reason):
    desired = desired_of(sa_in(1), sa_out(2), policy)
    assert desired.tunnel is None
    assert reasons(desired) == {(OffloadStatus.UNSUPPORTED, reason)}


def test_direction_comes_from_the_kernel_where_it_says_it():
    env = EnvironmentSnapshot({LOCAL: WAN, REMOTE: 2})  # both ends are ours: a test on one router
    desired = desired_of(sa_out(1, direction=SaDir.IN), sa_in(2, direction=SaDir.OUT), make_policy(), env=env)
    assert [spec.spi for spec in desired.tunnel.inbound] == [1]
    assert [spec.spi for spec in desired.tunnel.outbound] == [2]


def test_direction_comes_from_policies_where_both_ends_are_ours():
    env = EnvironmentSnapshot({LOCAL: WAN, REMOTE: 2})
    desired = desired_of(sa_in(1), sa_out(2), make_policy(), env=env)
    assert [spec.spi for spec in desired.tunnel.inbound] == [1]
    assert desired.tunnel.unnumbered_from == WAN


def test_tunnels_with_the_same_ends_differ_by_reqid_and_if_id():
    model = KernelModel()
    for reqid in range(1, 600):
        model.apply(SaAdded(sa_out(reqid, reqid=reqid)))
    model.apply(SaAdded(sa_out(5000, reqid=1, if_id=7)))
    assert len(model.tunnels) == 600
    assert len({tag_of(key) for key in model.tunnels}) == 600
    assert max(len(tag_of(key)) for key in model.tunnels) <= 63


def test_template_with_two_transformations_is_unsupported():
    template = make_policy().templates[0]
    comp = Template(**{f: getattr(template, f) for f in Template.__slots__} | {"proto": 108})
    desired = desired_of(sa_in(1), sa_out(2), make_policy(templates=(comp, template)))
    assert (OffloadStatus.UNSUPPORTED, "its policy asks for more than one transformation") in reasons(desired)


ANY4, ANY6 = Prefix(bytes(4), 0), Prefix(bytes(16), 0)
NEAR, FAR = Prefix(bytes((10, 1, 0, 0)), 24), Prefix(bytes((10, 2, 0, 0)), 24)
DENIALS = (Rule(False, ANY4, ANY4), Rule(False, ANY6, ANY6))


def policy_in(direction: PolicyDir = PolicyDir.IN, **changes: object) -> Policy:
    return make_policy(direction, "10.2.0.0/24", "10.1.0.0/24", **changes)


def inbound_rules(*policies: Policy, env: EnvironmentSnapshot = ENV) -> tuple[Rule, ...] | None:
    tunnel = desired_of(sa_in(1), sa_out(2), make_policy(), *policies, env=env).tunnel
    assert tunnel is not None
    return tunnel.inbound_rules


def test_inbound_rules_permit_in_and_fwd_policies_and_deny_the_rest():
    dns = replace(policy_in().selector, proto=17, dport=53, dport_mask=0xFFFF)
    assert inbound_rules() == DENIALS
    assert inbound_rules(policy_in(), policy_in(PolicyDir.FWD)) == (Rule(True, FAR, NEAR), *DENIALS)
    assert inbound_rules(policy_in(selector=dns)) == (Rule(True, FAR, NEAR, 17, ANY_PORT, (53, 53)), *DENIALS)
    six = make_policy(PolicyDir.FWD, "fd02::/64", "fd01::/64")
    assert len(inbound_rules(policy_in(), six)) == 4


@pytest.mark.parametrize("change", [{"action": 1}, {"mark": Mark(1, 1)}, {"type": 1}])
def test_policy_that_lets_nothing_in_here_admits_nothing(change):
    assert inbound_rules(policy_in(**change)) == DENIALS


def test_nothing_is_held_against_selectors_where_the_operator_says_so():
    assert inbound_rules(policy_in(), env=replace(ENV, enforce_selectors=False)) is None


def test_without_enforcement_a_vrf_tunnel_passes_ipv6_only_if_it_has_any():
    env, six = replace(IN_RED, tables=RED, enforce_selectors=False), make_policy(src="::/0", dst="fd02::/64", if_id=7)
    assert desired_of(*OF_A_VTI, env=env).tunnel.inbound_rules == (Rule(True, ANY4, ANY4), *DENIALS)
    assert desired_of(*OF_A_VTI, six, env=env).tunnel.inbound_rules is None
    assert desired_of(*OF_A_VTI, env=replace(env, vtis={7: 0})).tunnel.inbound_rules is None


def test_tunnel_whose_inbound_selectors_vpp_cannot_tell_is_unsupported():
    sctp = replace(policy_in().selector, proto=132, dport=53, dport_mask=0xFFFF)
    desired = desired_of(sa_in(1), sa_out(2), make_policy(), policy_in(selector=sctp))
    assert reasons(desired) == {
        (OffloadStatus.UNSUPPORTED, "its policy names ports of SCTP: VPP knows those of TCP and UDP"),
    }
    assert desired.tunnel is None


def test_keys_never_show():
    desired = desired_of(sa_in(1), sa_out(2, aead=None, crypt=CBC, auth=SHA256), make_policy())
    shown = repr(desired)
    for key in (GCM.key, CBC.key, SHA256.key):
        assert repr(key)[2:-1] not in shown
        assert key.hex() not in shown
    assert "3735928559" not in shown  # the salt
