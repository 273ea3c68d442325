"""The remote check against a router of ours that answers over HTTPS as VyOS's documented API does."""

from __future__ import annotations

import datetime
import ipaddress
import json
import runpy
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support.recorded import ROOT
from vppipsec.activation.verify import ConfigRefused, verify
from vppipsec.conf.cli import read_cli
from vppipsec.conf.commands import parse_commands
from vppipsec.conf.settings import SettingsError

pytest.importorskip("pyvyos", reason="pyvyos is not installed")
KEY = "an-api-key-of-the-test"


class FakeVyos(ThreadingHTTPServer):
    """A router: its configuration, committed with the project's own checks, and what it shows."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines: set[tuple[str, ...]] = {("vpp", "settings", "interface", "eth1")}
        self.commits = 0
        self.forgets = False
        """Accepts without doing: what the check is there to find."""
        self.silent = False

    def tree(self, path: list[str]) -> Any:
        """Return the configuration below a path as VyOS's showConfig does."""
        tree: dict[str, Any] = {}
        for line in self.lines:
            if list(line[: len(path)]) != path:
                continue
            place, words = tree, line[len(path) :]
            for word in words[:-1]:
                place = place.setdefault(word, {})
            if words:
                leaf = line[:2] == ("vpp", "ipsec") and len(line) > 3 and words[-1] != "disable"
                if leaf and len(words) > 1:
                    _at(tree, words[:-2])[words[-2]] = words[-1]
                else:
                    place[words[-1]] = {}
        return tree

    def known(self, path: list[str]) -> bool:
        return any(list(line[: len(path)]) == path for line in self.lines)

    def commit(self, operations: list[dict[str, Any]]) -> str:
        lines = set(self.lines)
        for operation in operations:
            path = tuple(operation["path"])
            if operation["op"] == "delete":
                lines = {line for line in lines if line[: len(path)] != path}
            else:
                lines = {line for line in lines if not (line[:2] == ("vpp", "ipsec") and line[:-1] == path[:-1])}
                lines.add(path)
        try:
            text = "\n".join("set " + " ".join(line) for line in lines)
            config = read_cli(parse_commands(text, "config").vpp, {})
            verify(config, lambda: config.interfaces)
        except (SettingsError, ConfigRefused) as error:
            return f"Commit failed\n{error}"
        if not self.forgets:
            self.lines = lines
        self.commits += 1
        return ""

    def show(self, path: list[str]) -> str:
        if self.silent:
            return ""
        return f"State      in-sync\n({' '.join(path)})" if path[:2] == ["vpp", "ipsec"] else ""


def _at(tree: dict[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    for word in words:
        tree = tree[word]
    return tree


class Handler(BaseHTTPRequestHandler):
    """The endpoints /retrieve, /configure and /show, with form fields `key` and `data`."""

    server: FakeVyos

    def do_POST(self) -> None:
        fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if fields.get("key") != [KEY]:
            return self._answer(401, "", "Valid API key is required")
        data = json.loads(fields["data"][0])
        if self.path == "/configure":
            complaint = self.server.commit(data if isinstance(data, list) else [data])
            return self._answer(400 if complaint else 200, None, complaint or None)
        if self.path == "/show":
            return self._answer(200, self.server.show(data["path"]), None)
        path = data.get("path", [])
        if not self.server.known(path):
            return self._answer(400, None, "Configuration under specified path is empty\n")
        return self._answer(200, self.server.tree(path), None)

    def _answer(self, status: int, data: Any, error: str | None) -> None:
        body = json.dumps({"success": error is None, "data": data, "error": error}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "router.test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*plain))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def router(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVyos]:
    server = FakeVyos()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("VYOS_API_KEY", KEY)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def remote(router: FakeVyos, *arguments: str) -> int:
    main = runpy.run_path(str(ROOT / "smoketest" / "remote.py"))["main"]
    return int(main(["127.0.0.1", "--port", str(router.server_address[1]), *arguments]))


def test_everything_holds_and_the_router_is_as_it_was(router: FakeVyos, capsys: pytest.CaptureFixture[str]) -> None:
    router.lines |= {("vpp", "ipsec", "unsupported", "drop"), ("vpp", "ipsec", "restart-rekey-rate", "77")}
    before = set(router.lines)
    assert remote(router, "--switch") == 0
    out = capsys.readouterr().out
    assert "ok   options are as they were set" in out
    assert "'restart-rekey-rate 0' is refused" in out
    assert "show vpp ipsec summary | sa" in out
    assert router.lines == before
    assert router.commits >= 4


def test_options_alone_leave_the_switch_alone(router: FakeVyos, capsys: pytest.CaptureFixture[str]) -> None:
    assert remote(router) == 0
    assert ("vpp", "settings", "ipsec-acceleration") not in router.lines
    assert "show vpp ipsec" not in capsys.readouterr().out


def test_router_that_accepts_without_doing_is_found(router: FakeVyos, capsys: pytest.CaptureFixture[str]) -> None:
    router.forgets = True
    assert remote(router) == 1
    assert "FAILED: restart-rekey-rate was set to 77, and is None" in capsys.readouterr().out


def test_view_that_says_nothing_is_found_and_all_is_put_back(
    router: FakeVyos, capsys: pytest.CaptureFixture[str]
) -> None:
    router.silent = True
    before = set(router.lines)
    assert remote(router, "--switch") == 1
    assert "FAILED: 'show vpp ipsec summary' says nothing" in capsys.readouterr().out
    assert router.lines == before


def test_wrong_key_and_unknown_certificate_are_told(
    router: FakeVyos, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VYOS_API_KEY", "wrong")
    assert remote(router) == 1
    assert "FAILED: the router refuses the API key" in capsys.readouterr().out
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert remote(router) == 1
    assert "FAILED: the router does not answer" in capsys.readouterr().out
    monkeypatch.setenv("VYOS_API_KEY", "")
    assert remote(router) == 2
