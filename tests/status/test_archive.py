"""The debug archive: whole, readable by its owner only, and without keys."""

import os
import stat
import tarfile

from vppipsec.status.archive import COMMANDS, QUESTIONS, write_archive
from vppipsec.status.server import StatusUnavailable

KEY = "5ec2e7a1" * 4
TOOLS = {
    "ip": f"""\
case "$*" in
*xfrm*state*nokeys*) echo "src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x00000101 enc cbc(aes) <<Keys hidden>>" ;;
*xfrm*state*|*xfrm*monitor*) echo "src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x00000101 enc cbc(aes) 0x{KEY}" ;;
esac""",
    "vppctl": f"""\
case "$*" in
"show ipsec all"|"show ipsec sa"*|"show ipsec backends"*) echo "crypto alg aes-cbc-128 key {KEY}" ;;
*) echo "vppctl $*" ;;
esac""",
    "swanctl": 'echo "swanctl $*"; exit 2',
}
"""Stand-ins for what prints keys where it is asked in the wrong way."""


def contents(path):
    with tarfile.open(path) as archive:
        return {member.name.split("/", 1)[1]: archive.extractfile(member).read().decode() for member in archive}


def test_it_has_what_the_service_says_and_what_the_kernel_holds_but_no_key(tmp_path, monkeypatch):
    for name, script in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = write_archive(tmp_path, lambda question: {"asked": question})
    files = contents(path)
    assert files["show-policy.json"] == '{\n  "asked": "show policy"\n}'
    assert "spi 0x00000101" in files["ip_-s_xfrm_state_list_nokeys.txt"]
    assert files["vppctl_show_ipsec_protect.txt"] == "vppctl show ipsec protect\n"
    assert files["swanctl_--list-sas.txt"] == "swanctl --list-sas\n\n(exit status 2)\n"
    assert [name for name, text in files.items() if KEY in text] == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_dead_service_is_told_in_the_archive_and_costs_nothing_else(tmp_path):
    def ask(question):
        raise StatusUnavailable("vpp-ipsecd does not answer")

    files = contents(write_archive(tmp_path, ask))
    assert [files[f"show-{what}.txt"] for what in QUESTIONS] == ["vpp-ipsecd does not answer\n"] * len(QUESTIONS)
    assert len([name for name in files if name.endswith(".txt")]) == len(QUESTIONS) + len(COMMANDS)
