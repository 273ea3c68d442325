"""From `set` commands to typed settings, what is refused, and what only warns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vppipsec.activation.proposals import why_not_supported
from vppipsec.activation.verify import ConfigRefused, granted_buffer, verify
from vppipsec.conf import settings as limits
from vppipsec.conf.cli import CliConfig, Proposal, read_cli
from vppipsec.conf.commands import format_commands, parse_commands
from vppipsec.conf.settings import (
    MetricsSettings,
    NetlinkSettings,
    OffloadSettings,
    Settings,
    VppSettings,
)


def config_of(*commands: str, base: Settings | None = None) -> CliConfig:
    parsed = parse_commands("\n".join(commands), "config")
    return read_cli(parsed.vpp, parsed.ipsec, base)


def check(*commands: str, interfaces=("eth0",), granted=lambda size: size) -> list[str]:
    return verify(config_of(*commands), lambda: interfaces, granted)


def test_every_command_gives_its_setting():
    config = config_of(
        "set vpp settings ipsec-acceleration",
        "set vpp settings interface eth0",
        "set vpp settings interface 'eth1'",
        "set vpp settings lcp netlink batch-delay-ms 20",
        "set vpp settings lcp netlink batch-size 500",
        "set vpp settings lcp netlink rx-buffer-size 1048576",
        "set vpp ipsec unsupported drop",
        "set vpp ipsec selector-enforcement disable",
        "set vpp ipsec statistics-interval '30'",
        "set vpp ipsec restart-rekey-rate 7",
        "set vpp ipsec metrics listen-address 2001:db8::1",
        "set vpp ipsec metrics port 9000",
    )
    assert config == CliConfig(
        accelerated=True,
        interfaces=("eth0", "eth1"),
        settings=Settings(
            netlink=NetlinkSettings(1_048_576, 500, 20),
            offload=OffloadSettings("drop", False, 7, 30),
            metrics=MetricsSettings("2001:db8::1", 9000),
        ),
    )


def test_nothing_is_off_with_defaults():
    assert config_of("", "# a comment") == CliConfig()


def test_unnamed_settings_are_kept_and_named_ones_reset_to_default():
    base = Settings(vpp=VppSettings(api_socket="/run/other.sock"), netlink=NetlinkSettings(70_000, 1, 1, 5))
    settings = config_of("set vpp settings lcp netlink batch-size 9", base=base).settings
    assert settings == Settings(vpp=base.vpp, netlink=NetlinkSettings(batch_size=9, resync_interval_s=5))


BAD_VALUES = {
    "vpp settings lcp netlink batch-delay-ms 60001": "must be from 0 to 60000",
    "vpp settings lcp netlink batch-size 0": "must be from 1 to 1000000",
    "vpp settings lcp netlink rx-buffer-size 4294967295": "must be from 65536 to 1073741824",
    "vpp settings lcp netlink rx-buffer-size many": "must be a whole number",
    "vpp settings lcp netlink rx-buffer-size 1e9": "must be a whole number",
    "vpp settings lcp netlink rx-buffer-size 0x10000": "must be a whole number",
    "vpp ipsec statistics-interval -1": "must be a whole number",
    "vpp ipsec restart-rekey-rate 10001": "must be from 1 to 10000",
    "vpp ipsec unsupported bypass": "must be 'kernel' or 'drop'",
    "vpp ipsec metrics port 0": "must be from 1 to 65535",
    "vpp ipsec metrics listen-address west": "must be an IP address",
}


@pytest.mark.parametrize("command", BAD_VALUES)
def test_a_value_out_of_range_is_refused_with_its_path(command):
    path, value = command.rsplit(" ", 1)
    with pytest.raises(ConfigRefused) as caught:
        check(f"set {command}")
    assert str(caught.value) == f"'{path}' {BAD_VALUES[command]}, not {value}"


def test_digits_of_other_scripts_and_numbers_of_any_length_are_refused_in_a_readable_sentence():
    with pytest.raises(ConfigRefused) as caught:
        check("set vpp ipsec metrics port \u0669\u0660", f"set vpp ipsec restart-rekey-rate {'9' * 5000}")
    assert str(caught.value).splitlines() == [
        "'vpp ipsec metrics port' must be a whole number, not \\u0669\\u0660",
        f"'vpp ipsec restart-rekey-rate' must be a whole number, not {'9' * 100}...",
    ]


def test_a_value_is_refused_with_the_line_where_that_is_known():
    parsed = parse_commands("\nset vpp ipsec unsupported maybe\n", "west.conf")
    places = {path: f"west.conf, line {number}" for path, number in parsed.lines.items()}
    assert read_cli(parsed.vpp, parsed.ipsec, places=places).complaints == (
        "west.conf, line 2: 'vpp ipsec unsupported' must be 'kernel' or 'drop', not maybe",
    )


def test_acceleration_without_an_interface_in_vpp_is_refused():
    with pytest.raises(
        ConfigRefused, match=r"^'vpp settings ipsec-acceleration' needs an interface that VPP carries: "
    ):
        check("set vpp settings ipsec-acceleration", interfaces=())


@pytest.mark.parametrize(("accelerated", "interfaces"), [(True, None), (True, ("eth0",)), (False, ())])
def test_commit_passes_where_vpp_cannot_be_asked_or_is_not_needed(accelerated, interfaces):
    commands = ["set vpp settings ipsec-acceleration"] if accelerated else []
    assert check(*commands, interfaces=interfaces) == []


def test_a_receive_buffer_that_the_kernel_does_not_grant_is_refused():
    with pytest.raises(ConfigRefused) as caught:
        check("set vpp settings ipsec-acceleration", granted=lambda size: 212_992)
    assert str(caught.value) == (
        "The kernel grants a receive buffer of 212992 bytes, not 268435456:"
        " set 'vpp settings lcp netlink rx-buffer-size' to 212992 or less"
    )


def test_the_kernel_is_asked_what_it_grants():
    assert granted_buffer(limits.RX_BUFFER_SIZE.low) == limits.RX_BUFFER_SIZE.low


def test_all_complaints_are_told_at_once():
    with pytest.raises(ConfigRefused) as caught:
        check("set vpp settings ipsec-acceleration", interfaces=(), granted=lambda size: 1)
    assert len(str(caught.value).splitlines()) == 2


WEST = (
    "set vpp settings ipsec-acceleration",
    "set vpn ipsec esp-group FAST proposal 1 encryption aes256gcm128",
    "set vpn ipsec esp-group OLD proposal 5 encryption camellia128",
    "set vpn ipsec esp-group OLD proposal 5 hash sha256",
    "set vpn ipsec esp-group OLD proposal 6",
    "set vpn ipsec site-to-site peer west default-esp-group OLD",
    "set vpn ipsec site-to-site peer west tunnel 1 esp-group FAST",
    "set vpn ipsec site-to-site peer west tunnel 2 local prefix 10.0.0.0/24",
)
UNSUPPORTED = (
    'VPP cannot carry proposal 5 (camellia128, sha256) of esp-group "OLD", which peer "west" uses'
    " (VPP has no cbc(camellia)); "
)


def test_a_proposal_that_vpp_cannot_carry_is_a_warning_with_the_peers_name():
    assert check(*WEST) == [
        UNSUPPORTED + "where it is negotiated, the kernel carries its traffic, more slowly than VPP"
    ]


def test_the_same_is_refused_where_such_traffic_would_be_dropped():
    with pytest.raises(ConfigRefused) as caught:
        check(*WEST, "set vpp ipsec unsupported drop")
    assert str(caught.value) == (
        UNSUPPORTED + "its traffic would be dropped: change the proposal, or set 'vpp ipsec unsupported kernel'"
    )


@pytest.mark.parametrize(
    "extra",
    [
        "set vpn ipsec site-to-site peer west disable",
        "set vpn ipsec esp-group OLD proposal 5 encryption aes128",
    ],
)
def test_nothing_is_said_of_what_is_disabled_or_can_be_carried(extra):
    assert check(*WEST, extra) == []


def test_nothing_is_said_while_acceleration_is_off():
    assert check(*WEST[1:]) == []


@pytest.mark.parametrize(
    ("commands", "who"),
    [
        (("site-to-site peer north vti bind vti1", "site-to-site peer north default-esp-group G"), 'peer "north"'),
        (("site-to-site peer north vti esp-group G",), 'peer "north"'),
        (("site-to-site peer north tunnel 1 disable", "site-to-site peer north tunnel 1 esp-group G"), None),
        (("remote-access connection road esp-group G",), 'remote-access connection "road"'),
        (("profile hub esp-group G",), 'profile "hub"'),
        (("profile hub disable", "profile hub esp-group G"), None),
    ],
)
def test_whoever_uses_a_group_is_named(commands, who):
    tunnel = ("set vpn ipsec esp-group G mode transport", "set vpn ipsec esp-group G proposal 1 encryption cast128")
    uses = config_of(*tunnel, *(f"set vpn ipsec {command}" for command in commands)).uses
    assert [use.user for use in uses] == ([who] if who else [])
    assert [use.proposal for use in uses] == ([Proposal("cast128", "sha1", "transport", False)] if who else [])


PROPOSALS = {
    ("aes256", "sha1"): None,
    ("aes128ctr", "sha512"): None,
    ("aes192gcm128", "sha256_96"): None,
    ("aes256gmac", "sha1"): None,
    ("chacha20poly1305", "sha1"): None,
    ("3des", "md5"): None,
    ("null", "sha384"): None,
    ("aes128gcm64", "sha1"): "rfc4106(gcm(aes)) with an ICV of 64 bits: VPP has 128 only",
    ("aes256ccm128", "sha1"): "VPP has no rfc4309(ccm(aes))",
    ("serpent256", "sha1"): "VPP has no cbc(serpent)",
    ("cast128", "sha1"): "VPP has no cbc(cast5)",
    ("aes128", "sha1_160"): "VPP has no hmac(sha1) with an ICV of 160 bits",
    ("aes128", "aesxcbc"): "VPP has no xcbc(aes) with an ICV of 96 bits",
    ("something-new", "sha1"): "VPP has no something-new",
}


@pytest.mark.parametrize(("encryption", "integrity"), PROPOSALS)
def test_whether_vpp_carries_a_proposal_is_told_as_show_sa_would(encryption, integrity):
    reason = why_not_supported(Proposal(encryption, integrity, "tunnel", False))
    assert reason == PROPOSALS[encryption, integrity]


def test_compression_is_not_carried():
    assert why_not_supported(Proposal("aes128", "sha1", "tunnel", True)) == "IPComp: only ESP is carried"


numbers = {
    ("netlink", "batch_delay_ms"): limits.BATCH_DELAY_MS,
    ("netlink", "batch_size"): limits.BATCH_SIZE,
    ("netlink", "rx_buffer_size"): limits.RX_BUFFER_SIZE,
    ("offload", "restart_rekey_rate"): limits.RESTART_REKEY_RATE,
    ("offload", "statistics_interval_s"): limits.STATISTICS_INTERVAL_S,
    ("metrics", "port"): limits.PORT,
}


def within(section, key):
    limit = numbers[section, key]
    return st.integers(limit.low, limit.high)


configs = st.builds(
    CliConfig,
    accelerated=st.booleans(),
    interfaces=st.lists(st.sampled_from(["eth0", "eth1", "bond0.7"]), unique=True).map(tuple),
    settings=st.builds(
        Settings,
        netlink=st.builds(
            NetlinkSettings,
            rx_buffer_size=within("netlink", "rx_buffer_size"),
            batch_size=within("netlink", "batch_size"),
            batch_delay_ms=within("netlink", "batch_delay_ms"),
        ),
        offload=st.builds(
            OffloadSettings,
            unsupported=st.sampled_from(["kernel", "drop"]),
            selector_enforcement=st.booleans(),
            restart_rekey_rate=within("offload", "restart_rekey_rate"),
            statistics_interval_s=within("offload", "statistics_interval_s"),
        ),
        metrics=st.builds(
            MetricsSettings,
            listen_address=st.sampled_from(["", "192.0.2.1", "2001:db8::1"]),
            port=within("metrics", "port"),
        ),
    ),
)


@given(configs)
def test_commands_give_back_the_configuration_that_they_were_made_of(config):
    assert config_of(*format_commands(config)) == config
