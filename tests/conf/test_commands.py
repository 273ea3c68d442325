"""A file of `set` commands: what is ours is taken, what is VyOS's is left out, and what may be a typo is refused by its line."""

import random
import re
from collections.abc import Sequence

import pytest

from vppipsec.conf.cli import CliConfig, read_cli
from vppipsec.conf.commands import Commands, format_commands, parse_commands
from vppipsec.conf.nodes import ACCELERATION, ENFORCEMENT, INTERFACE, LEAVES
from vppipsec.conf.settings import MetricsSettings, Settings, SettingsError

SWITCH = f"set {ACCELERATION}"
RIGHT = (SWITCH, f"set {ENFORCEMENT}", f"set {INTERFACE} eth0", *(f"set {path} 5" for path in LEAVES))


def read(text: str) -> CliConfig:
    parsed = parse_commands(text, "west.conf")
    return read_cli(parsed.vpp, parsed.ipsec)


def complaints(text: str) -> list[str]:
    """Return what is said of a wrong file, a line each; none where nothing is wrong."""
    try:
        parse_commands(text, "west.conf")
    except SettingsError as error:
        return str(error).splitlines()
    return []


# What is taken


@pytest.mark.parametrize(
    "text",
    [
        f"{SWITCH}\n",
        SWITCH,
        f"{SWITCH}\r\n",
        f"\r\n# first\r\n{SWITCH}\r\n\r\n",
        f"  \t{SWITCH}  \t\n",
        "set\tvpp \t settings   ipsec-acceleration\n",
        "set 'vpp' \"settings\" ipsec-'acceleration'\n",
        f"{SWITCH} # it's on\n",
        f"{SWITCH}\t#\n",
        f"{SWITCH}\n{SWITCH}\n",
        f"# an 'unclosed quote\n   # another\n\n{SWITCH}\n",
    ],
)
def test_blanks_line_ends_quotes_comments_and_repetition_change_nothing(text: str) -> None:
    assert read(text) == CliConfig(accelerated=True)


ROUTER = """\
set interfaces ethernet eth0 address '192.0.2.1/24'
set interfaces ethernet eth0 description 'ipsec-acceleration'
set interfaces vpp bonding vppbond0 member interface 'eth4'
comment interfaces 'the provider's side'
set firewall group network-group vpp network '10.0.0.0/8'
set nat source rule 10 outbound-interface name 'eth0'
set policy route vpp rule 1 action 'accept'
set protocols bgp system-as '65001'
set qos policy shaper settings bandwidth '1gbit'
set service ssh port '22'
set system host-name 'ipsec-acceleration'
set system option performance 'network-latency' # a comment
set vrf name settings table '100'
set vpn ipsec authentication psk west secret 'it''s secret'
set vpn ipsec authentication psk west id '#1'
set vpn ipsec esp-group G proposal 1 encryption 'aes256gcm128'
set vpn ipsec ike-group G proposal 1 dh-group '19'
set vpn ipsec interface 'eth0'
set vpn ipsec log level '2'
set vpn ipsec options disable-route-autoinstall
set vpn ipsec profile P disable
set vpn ipsec remote-access pool vpp prefix '10.9.0.0/24'
set vpn ipsec site-to-site peer west default-esp-group 'G'
set vpn l2tp remote-access authentication mode 'local'
set vpp acl ip tag-name ipsec rule 1 action 'permit'
set vpp interfaces gre gre10 remote '192.0.2.2'
set vpp ipfix active-timeout '15'
set vpp kernel-interfaces vpptun10 address '10.0.0.1/24'
set vpp nat cgnat rule 1 inside-prefix '10.0.0.0/8'
set vpp nat44 exclude rule 1 local-port '22'
set vpp settings allow-unsupported-nics
set vpp settings cpu workers '4'
set vpp settings interface eth0
set vpp settings interface eth1 driver 'dpdk'
set vpp settings interface eth2 num-rx-queues '2'
set vpp settings interface-rx-mode 'polling'
set vpp settings ipsec interface-type 'ipsec'
set vpp settings ipsec netlink rx-buffer-size '32000'
set vpp settings ipsec-acceleration
set vpp settings lcp ignore-kernel-routes
set vpp settings memory main-heap-size '3G'
set vpp settings resource-allocation cpu-cores '4'
set vpp settings unix poll-sleep-usec '222'
set vpp sflow interface 'eth1'
"""
"""Commands of VyOS's of several generations, those that are most like ours among them."""


def test_a_whole_router_configuration_can_be_given() -> None:
    assert read(ROUTER) == CliConfig(accelerated=True, interfaces=("eth0", "eth1", "eth2"))


def test_a_large_configuration_is_read_in_seconds() -> None:
    routes = [f"set protocols static route 10.{i >> 8}.{i & 255}.0/24 next-hop 192.0.2.9" for i in range(3000)]
    peers = [f"set vpn ipsec site-to-site peer p{i} tunnel 1 remote prefix 10.0.0.0/8" for i in range(3000)]
    assert read("\n".join([*routes, *peers, SWITCH])).accelerated


@pytest.mark.parametrize("name", ["eth0", "bond0.7", "GigabitEthernet0/8/0", "host-vpp1", "2001"])
def test_interfaces_are_taken_by_vpps_names_too(name: str) -> None:
    assert read(f"set {INTERFACE} {name}").interfaces == (name,)


def test_a_value_with_blanks_comes_back_as_it_was() -> None:
    config = CliConfig(settings=Settings(metrics=MetricsSettings("fe80::1%x y")))
    assert read("\n".join(format_commands(config))) == config


def test_lines_are_counted_as_an_editor_counts_them() -> None:
    text = f"set system host-name 'a\u2028b'\n{SWITCH}on\n"
    assert complaints(text)[0].startswith("west.conf, line 2: ")


def test_of_our_leaves_the_line_is_known() -> None:
    parsed = parse_commands(f"{SWITCH}\n\nset vpp ipsec metrics port 1\nset vpp ipsec metrics port 1\n", "west.conf")
    assert parsed == Commands(parsed.tree, {"vpp ipsec metrics port": 3}, 3)


# What is refused


BAD = {
    # one letter, one word, one blank
    "set vpp settings ipsec-acceleraton": ("vpp settings ipsec-acceleraton", ACCELERATION),
    "set vpp settings ipsec-acceleration#": ("vpp settings ipsec-acceleration#", ACCELERATION),
    "set vpp settings ipsec acceleration": ("vpp settings ipsec", ACCELERATION),
    "set vpp settings ipsec_acceleration": ("vpp settings ipsec_acceleration", ACCELERATION),
    "set vpp settings acceleration": ("vpp settings acceleration", ACCELERATION),
    "set vpp settings ipsec": ("vpp settings ipsec", ACCELERATION),
    "set vpp ipsec-acceleration": ("vpp ipsec-acceleration", ACCELERATION),
    "set vpp setings ipsec-acceleration": ("vpp setings ipsec-acceleration", ACCELERATION),
    "set vpp Settings ipsec-acceleration": ("vpp Settings ipsec-acceleration", ACCELERATION),
    "set 'vpp settings ipsec-acceleration'": ('"vpp settings ipsec-acceleration"', ACCELERATION),
    "set vpp settings\u00a0ipsec-acceleration": ("vpp settings\\xa0ipsec-acceleration", ACCELERATION),
    "set vpp settings ipsec\u200b-acceleration": ("vpp settings ipsec\\u200b-acceleration", ACCELERATION),
    "set vpp settings ipsec\u2010acceleration": ("vpp settings ipsec\\u2010acceleration", ACCELERATION),
    "set vpp settings ipsec-accelerati\u043en on": ("vpp settings ipsec-accelerati\\u043en", ACCELERATION),
    "set vpp ipsec unsupportd drop": ("vpp ipsec unsupportd", "vpp ipsec unsupported"),
    "set vpp settings unsupported drop": ("vpp settings unsupported", "vpp ipsec unsupported"),
    "set vpp ipsec batch-size 5": ("vpp ipsec batch-size 5", "vpp settings lcp netlink batch-size"),
    "set vpp settings netlink batch-size 5": (
        "vpp settings netlink batch-size 5",
        "vpp settings lcp netlink batch-size",
    ),
    "set vpp settings lcp netlink rx-buffer 1": (
        "vpp settings lcp netlink rx-buffer",
        "vpp settings lcp netlink rx-buffer-size",
    ),
    "set vpp ipsec selector-enforcement enable": ("vpp ipsec selector-enforcement enable", ENFORCEMENT),
    "set vpp settings interfaces eth0": ("vpp settings interfaces", INTERFACE),
    "set vpp settings interface eth0 drvier dpdk": (
        "vpp settings interface eth0 drvier",
        "vpp settings interface eth0 driver",
    ),
    "set vpp settings cpus workers 4": ("vpp settings cpus", "vpp settings cpu"),
    "set vpp nat4 exclude": ("vpp nat4 exclude", "vpp nat"),
    # in another tree, but like one of ours
    "set vp settings ipsec-acceleration": ("vp settings ipsec-acceleration", ACCELERATION),
    "set vvp settings ipsec-acceleration": ("vvp settings ipsec-acceleration", ACCELERATION),
    "set VPP settings ipsec-acceleration": ("VPP settings ipsec-acceleration", ACCELERATION),
    "set vpn settings ipsec-acceleration": ("vpn settings ipsec-acceleration", ACCELERATION),
    "set v pp settings ipsec-acceleration": ("v pp settings", ACCELERATION),
    "set vppsettings ipsec-acceleration": ("vppsettings ipsec-acceleration", ACCELERATION),
    "set vpp\u00a0settings ipsec-acceleration": ("vpp\\xa0settings ipsec-acceleration", ACCELERATION),
    "set v\u0440\u0440 settings ipsec-acceleration": ("v\\u0440\\u0440 settings ipsec-acceleration", ACCELERATION),
    "set settings ipsec-acceleration": ("settings ipsec-acceleration", ACCELERATION),
    "set ipsec-acceleration": ("ipsec-acceleration", ACCELERATION),
    "set vpn ipsec-acceleration": ("vpn ipsec-acceleration", ACCELERATION),
    "set system vpp settings ipsec-acceleration": ("system vpp settings", ACCELERATION),
    "set vp settings interface eth0": ("vp settings interface", INTERFACE),
    "set vpn ipsec unsupported drop": ("vpn ipsec unsupported", "vpp ipsec unsupported"),
    "set vpn ipsec statistics-interval 30": ("vpn ipsec statistics-interval", "vpp ipsec statistics-interval"),
    "set vpn ipsec selector-enforcement disable": ("vpn ipsec selector-enforcement disable", ENFORCEMENT),
}
"""Commands that nobody knows, what is shown of each, and what it is nearest to."""


@pytest.mark.parametrize("command", BAD)
def test_an_unknown_command_is_refused_with_its_line_and_the_nearest_known_path(command: str) -> None:
    about, nearest = BAD[command]
    assert complaints(f"# first\n{command}\n{SWITCH}\n") == [
        f"west.conf, line 2: there is no '{about}'; did you mean '{nearest}'?"
    ]


CONFIG_BOOT = "this is a line of VyOS's config.boot; 'show configuration commands' gives set commands"
MALFORMED = {
    "set vpp ipsec unsupported": "'vpp ipsec unsupported' needs a value",
    "set vpp ipsec unsupported ''": "'vpp ipsec unsupported' needs a value",
    "set vpp ipsec unsupported drop now": "'vpp ipsec unsupported' takes one value, not 'drop now'",
    f"{SWITCH} on": "'vpp settings ipsec-acceleration' takes no value, but 'on' follows",
    f"{SWITCH} ''": "'vpp settings ipsec-acceleration' takes no value, but '\"\"' follows",
    f"set {ENFORCEMENT} true": "'vpp ipsec selector-enforcement disable' takes no value, but 'true' follows",
    "set vpp": "'vpp' is not complete: it goes on with acl, interfaces, ipfix, ipsec, kernel-interfaces, nat, nat44,"
    " settings, sflow",
    "set vpp ipsec": "'vpp ipsec' is not complete: it goes on with metrics, restart-rekey-rate, selector-enforcement,"
    " statistics-interval, unsupported",
    "set vpp ipsec selector-enforcement": "'vpp ipsec selector-enforcement' is not complete: it goes on with disable",
    "set vpp settings lcp netlink": "'vpp settings lcp netlink' is not complete: it goes on with batch-delay-ms,"
    " batch-size, rx-buffer-size",
    "set vpp settings interface": "'vpp settings interface' needs the name of an interface",
    "set vpp settings interface ''": "'vpp settings interface' needs the name of an interface",
    "set vpp settings interface 'eth0 eth1'": "'vpp settings interface' needs the name of an interface, not 'eth0 eth1'",
    "set vpp settings interface \u20ac": "'vpp settings interface' needs the name of an interface, not '\\u20ac'",
    "set": "after 'set' comes a path",
    "set ''": "after 'set' comes a path",
    f"set {SWITCH}": "after 'set' comes a path",
    f"sett {ACCELERATION}": f"'sett {ACCELERATION}' is not a set command: it begins with 'sett'; did you mean 'set'?",
    f"Set {ACCELERATION}": f"'Set {ACCELERATION}' is not a set command: it begins with 'Set'; did you mean 'set'?",
    f"\ufeff{SWITCH}": f"'\\ufeff{SWITCH}' is not a set command: it begins with '\\ufeffset'; did you mean 'set'?",
    ACCELERATION: f"'{ACCELERATION}' is not a set command; did you mean 'set {ACCELERATION}'?",
    f"delete {ACCELERATION}": f"'delete {ACCELERATION}' is not a set command: the file is the whole configuration, so"
    " leave out what is to go",
    "delete system host-name": "this is not a set command: the file is the whole configuration, so leave out what is to go",
    "commit": "this is not a set command",
    "vpp {": CONFIG_BOOT,
    "    settings {": CONFIG_BOOT,
    "}": CONFIG_BOOT,
    "set vpp ipsec unsupported 'drop": "a quote is not closed",
    'set vpp ipsec unsupported drop"': "a quote is not closed",
    "set system host-name 'west": "a quote is not closed",
    "set vpp ipsec unsupported drop\\": "it ends with a backslash",
    "set vpp \x1b[2Jipsec": "it has a control character, \\x1b; lines end with LF or CRLF",
    f"# Macintosh\r{SWITCH}": "it has a control character, \\r; lines end with LF or CRLF",
    "\0": "it has a control character, \\x00; lines end with LF or CRLF",
}


@pytest.mark.parametrize("command", MALFORMED)
def test_a_malformed_line_is_refused_with_its_number(command: str) -> None:
    assert complaints(f"# first\n{command}\n") == [f"west.conf, line 2: {MALFORMED[command]}"]


def test_a_second_value_is_refused_with_both_lines() -> None:
    text = "set vpp ipsec metrics port 1\n\nset vpp ipsec metrics port 2\n"
    assert complaints(text) == ["west.conf, line 3: 'vpp ipsec metrics port' has another value in line 1"]


def test_all_wrong_lines_are_told_up_to_ten() -> None:
    assert [line.split(":")[0] for line in complaints(f"bad\n{SWITCH}\nset vpp bad\n")] == [
        "west.conf, line 1",
        "west.conf, line 3",
    ]
    told = complaints("set vpp bad\n" * 100_000)
    assert len(told) == 11
    assert told[-1] == "west.conf: the lines after line 10 were not read"


@pytest.mark.parametrize("line", ["set vpp " + "x" * 1_000_000, "set " + "vpp " * 100_000, "'\"" * 100_000 + "'"])
def test_a_line_of_any_length_costs_one_short_complaint(line: str) -> None:
    (told,) = complaints(line)
    assert len(told) < 300


SECRET = "hunter2"


@pytest.mark.parametrize(
    "line",
    [
        f"set vpn ipsec authentication psk west secret '{SECRET}",
        f"sett vpn ipsec authentication psk west secret {SECRET}",
        f"delete vpn ipsec authentication psk west secret {SECRET}",
        f"vpn ipsec authentication psk west secret {SECRET}",
        f"{SECRET}",
        f"secret {SECRET};",
        f"set vpn ipsec authentication psk west secret {SECRET}\\",
        f"set vpn ipsec authentication psk west secret '{SECRET}\x07'",
        f"set vpn ipsec unsupported secret {SECRET}",
    ],
)
def test_a_complaint_repeats_nothing_that_may_be_a_secret(line: str) -> None:
    (told,) = complaints(line)
    assert SECRET not in told


def mistype(command: str, chance: random.Random) -> str:
    """Return a command with one letter lost, added, exchanged for another or for the next one."""
    at = chance.randrange(len(command))
    letter = chance.choice("aeintx -_.")
    before, here, after = command[:at], command[at], command[at + 1 :]
    changed = ("", letter + here, letter, after[:1] + here)
    how = chance.randrange(len(changed))
    return before + changed[how] + (after[1:] if how == 3 else after)


def test_no_command_of_ours_is_lost_by_one_wrong_letter() -> None:
    chance = random.Random(1)
    lost = []
    for command in RIGHT:
        meant = parse_commands(command, "west.conf")
        for wrong in {mistype(command, chance) for _ in range(25)}:
            told = complaints(wrong)
            if told:
                assert re.match(r"west\.conf, line 1: ", told[0])
            elif not same_setting(parse_commands(wrong, "west.conf"), meant):
                lost.append(wrong)
    assert lost == []


def same_setting(some: Commands, other: Commands) -> bool:
    """Tell whether two commands set the same, to whatever value."""
    return paths(some.tree) == paths(other.tree) or (_interfaces(some) and _interfaces(other))


def paths(tree: object, at: Sequence[str] = ()) -> set[tuple[str, ...]]:
    if not isinstance(tree, dict) or not tree:
        return {tuple(at)}
    return {path for name, below in tree.items() for path in paths(below, (*at, name))}


def _interfaces(commands: Commands) -> bool:
    return bool(read_cli(commands.vpp, {}).interfaces)
