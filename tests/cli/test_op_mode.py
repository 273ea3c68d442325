"""Op mode as VyOS runs it: under vyos-1x's own library where there is one, else under a stand-in for it."""

import asyncio
import json
import tarfile
from pathlib import Path

import pytest
import templates

from support import vyos_box
from support.build import GCM, make_policy, sa_in, sa_out
from support.recorded import ROOT
from support.rig import play
from vppipsec.status.server import StatusServer

SCRIPT = ROOT / "src" / "op_mode" / "vpp_ipsec.py"
ON = "set vpp settings ipsec-acceleration\n"

pytestmark = [pytest.mark.versions, pytest.mark.parametrize("library", [vyos_box.LIBRARY])]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    built = tmp_path_factory.mktemp("build")
    templates.build(ROOT, built)
    return str(built / "xml_ref" / "vyos_vpp_ipsec_cache.py")


@pytest.fixture
def op(tmp_path, reference):
    """Run one op-mode command as its node.def does; returns what happened."""

    def run(*argv, commands=ON):
        job = {"script": str(SCRIPT), "argv": argv, "commands": commands, "conf": str(tmp_path / "config.toml")}
        return vyos_box.run(job | {"reference": reference})

    (tmp_path / "config.toml").write_text(f'[status]\nsocket = "{tmp_path}/status.sock"\n')
    return run


@pytest.fixture
def answers(op, tmp_path):
    """What each of some commands answers while the service carries one tunnel."""

    def run(*commands):
        found = []

        async def story(rig):
            rig.kernel.add(sa_out(0x100), sa_in(0x200), make_policy())
            rig.start()
            await rig.settle()
            status = StatusServer(rig.engine, str(tmp_path / "status.sock"))
            await status.start()
            try:
                for command in commands:
                    found.append(await asyncio.to_thread(op, *command))
            finally:
                await status.stop()

        play("standin", story)
        assert [answer["error"] for answer in found] == [None] * len(commands)
        assert GCM.key.hex() not in json.dumps(found)
        return [answer["result"] for answer in found]

    return run


SHOWS = {
    "show_summary": "in-sync",
    "show_sa": "0x00000100",
    "show_policy": "10.",
    "show_tunnel": "192.0.2.2",
    "show_events": "connected to VPP",
    "show_counters": "0x00000200",
}


@pytest.mark.slow
def test_every_show_answers_on_a_screen_and_raw(library, answers):
    texts = answers(*((name,) for name in SHOWS))
    for word, text in zip(SHOWS.values(), texts, strict=True):
        assert word in text
        assert len(text.splitlines()) <= 24
    for raw in answers(*((name, "--raw") for name in SHOWS)):
        assert isinstance(json.loads(raw), list | dict)


def test_sas_can_be_narrowed_to_a_peer_an_spi_and_their_details(library, answers):
    of_peer, of_other, of_spi, detail = answers(
        ("show_sa", "--peer=192.0.2.2", "--raw"),
        ("show_sa", "--peer=192.0.2.77"),
        ("show_sa", "--spi=0x200", "--raw"),
        ("show_sa", "--spi=512", "--detail"),
    )
    assert [row["spi"] for row in json.loads(of_peer)] == ["0x00000100", "0x00000200"]
    assert of_other == "There are no such SAs in the kernel."
    assert [row["spi"] for row in json.loads(of_spi)] == ["0x00000200"]
    assert "0x00000200" in detail
    assert "0x00000100" not in detail


def test_reset_asks_the_service_and_says_so(library, answers, op):
    assert answers(("reset_sync",)) == [None]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("show_sa", "--peer=west"), "IncorrectValue: 'west' is not an IP address: name a peer by its address"),
        (("show_sa", "--spi=west"), "IncorrectValue: 'west' is not an SPI: write it as 0xc1234567"),
    ],
)
def test_a_wrong_argument_is_named(library, op, argv, error):
    assert op(*argv)["error"] == error


@pytest.mark.parametrize("name", [*SHOWS, "reset_sync"])
def test_while_it_is_off_or_dead_one_line_says_so(library, op, tmp_path, name):
    off = op(name, commands="")
    assert off["error"] == (
        "UnconfiguredSubsystem: IPsec acceleration is off: 'vpp settings ipsec-acceleration' is not set"
    )
    dead = op(name)
    assert dead["error"] == (
        f"DataUnavailable: vpp-ipsecd does not answer on {tmp_path}/status.sock: No such file or directory;"
        " is the service running?"
    )


def test_the_debug_archive_is_named_also_while_the_service_is_dead(library, op):
    path = Path(json.loads(op("generate_debug_archive", "--raw")["result"])["archive"])
    try:
        with tarfile.open(path) as archive:
            assert any(member.name.endswith("/show-sync.txt") for member in archive)
    finally:
        path.unlink()


def test_every_command_of_the_definitions_is_one_of_the_script(library, tmp_path):
    templates.build(ROOT, tmp_path)
    runs = "".join(path.read_text() for path in (tmp_path / "templates" / "op").rglob("node.def"))
    named = {line.split("vpp_ipsec.py ")[1].split()[0] for line in runs.splitlines() if line.startswith("run: ")}
    assert named == {*SHOWS, "reset_sync", "generate_debug_archive"}
