"""The stand-in speaks VPP's protocol: vpp_papi's own client talks to it, and hostile bytes do it no harm."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vpp_papi import VPPApiClient

from support.recorded import PATIENCE_S
from support.vpp_box import listens, start_standin

pytestmark = pytest.mark.versions


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    path = str(tmp_path / "api.sock")
    process = start_standin(path, stderr=subprocess.PIPE, text=True)
    assert listens(path, PATIENCE_S, lambda: process.poll() is None)
    yield path, process
    process.kill()
    process.wait(10)


def test_vpp_papi_bootstraps_from_it_and_several_clients_share_it(standin: tuple[str, subprocess.Popen[str]]) -> None:
    path, process = standin
    first, second = (VPPApiClient(bootstrapapi=True, server_address=path) for _ in range(2))
    first.connect("first")
    second.connect("second")
    index = first.api.create_loopback_instance(mac_address="de:ad:00:00:00:01", is_specified=False).sw_if_index
    first.api.sw_interface_add_del_address(sw_if_index=index, is_add=True, prefix="10.0.0.1/24")
    names = [itf.interface_name for itf in second.api.sw_interface_dump()]
    assert names == ["local0", "loop0"]
    assert str(second.api.ip_address_dump(sw_if_index=index, is_ipv6=False)[0].prefix) == "10.0.0.1/24"
    assert first.api.control_ping().vpe_pid == process.pid
    first.disconnect()
    second.disconnect()


def test_it_ends_on_sigterm_with_status_0(standin: tuple[str, subprocess.Popen[str]]) -> None:
    _, process = standin
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


def test_it_dies_with_status_139_and_a_sentence(standin: tuple[str, subprocess.Popen[str]]) -> None:
    path, process = standin
    client = VPPApiClient(bootstrapapi=True, server_address=path, read_timeout=2)
    client.connect("deadly")
    key = {"length": 16, "data": bytes(16)}
    entry = {"sad_id": 1, "spi": 1, "protocol": 50, "crypto_algorithm": 9, "crypto_key": key, "flags": 4}
    entry["tunnel"] = {"src": "192.0.2.1", "dst": "192.0.2.2"}
    with contextlib.suppress(Exception):  # vpp_papi has several for a lost connection, and sometimes none
        client.api.ipsec_sad_entry_add_v2(entry=entry)
    assert process.wait(PATIENCE_S) == 139
    assert process.stderr is not None
    assert "VPP would have died: ipsec_sad_entry_add_v2: AES_GCM_256 with a key of 16 bytes" in process.stderr.read()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">QII", 0, 1 << 30, 0),
        struct.pack(">QII", 0, 4, 0) + b"\xff\xff\0\0",
        struct.pack(">QII", 0, 3, 0) + b"\0\x0f\0",
        b"\0" * 7,
    ],
)
def test_hostile_bytes_cost_their_sender_alone(standin: tuple[str, subprocess.Popen[str]], data: bytes) -> None:
    path, process = standin
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(path)
        hostile.sendall(data)
    client = VPPApiClient(bootstrapapi=True, server_address=path)
    client.connect("good")
    assert client.api.control_ping().retval == 0
    client.disconnect()
    assert process.poll() is None


def test_request_in_pieces_is_understood(standin: tuple[str, subprocess.Popen[str]]) -> None:
    path, _ = standin
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(path)
        slow.settimeout(PATIENCE_S)
        message = struct.pack(">HI64s", 15, 77, b"slow")
        for byte in struct.pack(">QII", 0, len(message), 0) + message:
            slow.sendall(bytes([byte]))
        header = slow.recv(16, socket.MSG_WAITALL)
        length = struct.unpack(">QII", header)[1]
        reply = slow.recv(length, socket.MSG_WAITALL)
    assert struct.unpack_from(">H", reply)[0] == 16
    assert b"control_ping_51077d14" in reply
