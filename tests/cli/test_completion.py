"""Completion of peers and SPIs, and which SAs an operator means by them."""

import json
import socket
import subprocess
import sys
import threading

import pytest

from support.recorded import ROOT
from vppipsec.status.select import SelectionError, parse_peer, parse_spi, peers, spis

SCRIPT = ROOT / "src" / "completion" / "list_vpp_ipsec.py"
ROWS = [
    {"spi": "0xc1000001", "src": "192.0.2.1", "dst": "198.51.100.9", "direction": "out"},
    {"spi": "0xc2000002", "src": "198.51.100.9", "dst": "192.0.2.1", "direction": "in"},
    {"spi": "0x00000100", "src": "192.0.2.1", "dst": "198.51.100.10", "direction": "out"},
    {"spi": "0xc3000003", "src": "2001:db8::2", "dst": "2001:db8::1", "direction": "in"},
]


@pytest.fixture
def status_socket(tmp_path):
    """A status socket that answers one question with ROWS."""
    path = tmp_path / "status.sock"
    asked = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(20)
        listener.bind(str(path))
        listener.listen()

        def answer():
            client, _ = listener.accept()
            with client, client.makefile("rwb") as stream:
                asked.append(json.loads(stream.readline()))
                stream.write(json.dumps({"answer": ROWS}).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield path
        thread.join(20)
    assert [question["ask"] for question in asked] == ["show sa"]


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("peer", "198.51.100.9 198.51.100.10 2001:db8::2"),
        ("spi", "0x00000100 0xc1000001 0xc2000002 0xc3000003"),
    ],
)
def test_completion_offers_what_the_service_knows(status_socket, what, words):
    ran = run(what, "--socket", status_socket)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, words + "\n", "")


def test_completion_is_silent_where_the_service_is_not_running(tmp_path):
    ran = run("peer", "--socket", tmp_path / "none.sock")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize(("text", "peer"), [("198.51.100.9", "198.51.100.9"), ("2001:0DB8:0::2", "2001:db8::2")])
def test_a_peer_is_meant_by_its_address_however_it_is_written(text, peer):
    assert parse_peer(text) == peer


@pytest.mark.parametrize("text", ["0x100", "0x00000100", "256"])
def test_an_spi_is_meant_by_its_number_however_it_is_written(text):
    assert parse_spi(text) == 256


@pytest.mark.parametrize("text", ["west", "0", "-5", "0x100000000"])
def test_what_is_no_spi_is_named_in_the_complaint(text):
    with pytest.raises(SelectionError, match=rf"^'{text}' is not an SPI: write it as 0xc1234567$"):
        parse_spi(text)


def test_what_is_no_address_is_named_in_the_complaint():
    with pytest.raises(SelectionError, match=r"^'west' is not an IP address: name a peer by its address$"):
        parse_peer("west")


def test_both_ends_are_offered_while_the_direction_is_unknown():
    assert peers([{**ROWS[0], "direction": "?"}]) == ["192.0.2.1", "198.51.100.9"]
    assert spis(ROWS[:1]) == ["0xc1000001"]
