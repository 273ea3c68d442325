"""The guests that are virtual machines: QEMU with the kernel of Debian's linux-image-amd64, with KVM and without.

Without KVM they are slower than `uml`. Both have what `uml` lacks: xfrm interfaces, and vhost-net, which linux-cp
needs. The kernel is unpacked into a cache directory, $VPPIPSEC_LAB_CACHE or ~/.cache/vpp-ipsec-lab, and never
installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar, NamedTuple

from guest import HERE, PATH, Guest, GuestError

_PACKAGE = "linux-image-amd64"
_ROOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p")
"""Modules without which the kernel cannot read the host's files."""
_DOWNLOAD_S = 600.0


class Kernel(NamedTuple):
    """An unpacked kernel: its image, and the directory of its modules, which is named after its release."""

    image: Path
    modules: Path


def kernel_cache() -> Path:
    """Return the directory where the kernel is kept."""
    named = os.environ.get("VPPIPSEC_LAB_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpp-ipsec-lab"


def find_kernel() -> Kernel | None:
    """Return the newest kernel in the cache, None where there is none."""
    images = sorted(kernel_cache().glob("linux-image-*/boot/vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    if not images:
        return None
    release = images[-1].name.removeprefix("vmlinuz-")
    return Kernel(images[-1], images[-1].parent.parent / "lib" / "modules" / release)


def fetch_kernel() -> Path:
    """Download the kernel that Debian's package depends on, and unpack it into the cache. Return its path.

    Raises GuestError.
    """
    said = _run("apt-cache", "depends", _PACKAGE)
    named = re.search(r"Depends: (linux-image-\S+)", said)
    if named is None:
        raise GuestError(f"{_PACKAGE} names no kernel; 'apt-get update' may help")
    place = kernel_cache() / named[1]
    if place.exists():
        return place
    kernel_cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kernel_cache()) as name:
        _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", named[1], cwd=name)
        unpacked = Path(name, "unpacked")
        _run("dpkg-deb", "-x", str(next(Path(name).glob("*.deb"))), str(unpacked))
        _run("depmod", "-b", str(unpacked), named[1].removeprefix("linux-image-"))
        unpacked.rename(place)  # so an existing directory is always complete
    return place


def _run(*command: str, cwd: str | Path | None = None) -> str:
    environment = os.environ | {"PATH": PATH, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=_DOWNLOAD_S)
    if done.returncode:
        raise GuestError(f"'{' '.join(command)}' failed: {done.stderr.strip() or 'it says nothing'}")
    return done.stdout


class Qemu(Guest):
    """A QEMU guest, with one processor: more are slower in an emulation."""

    name = "QEMU without KVM"
    programs: ClassVar = {
        "qemu-system-x86_64": "qemu-system-x86",
        "busybox": "busybox-static",
        "cpio": "cpio",
        "ethtool": "ethtool",
    }
    start_s = 120.0
    processor: ClassVar = ("-accel", "tcg", "-cpu", "max,-avx,-avx2")

    @classmethod
    def obstacle(cls) -> str | None:
        """Return in a sentence why this kind cannot start here and what to do about it, or None where it can."""
        if why := super().obstacle():
            return why
        if find_kernel() is None:
            return f"Debian's kernel is not in {kernel_cache()}: 'make lab-kernel' puts it there"
        return None

    def _command_line(self) -> list[str]:
        kernel = find_kernel()
        assert kernel is not None
        shares = [
            option
            for tag, path, access in (("root", "/", "on"), ("job", str(self.directory).replace(",", ",,"), "off"))
            for option in (
                "-virtfs",
                f"local,path={path},mount_tag={tag},readonly={access},security_model=none,multidevs=remap",
            )
        ]
        arguments = [
            *("console=ttyS0", "quiet", "loglevel=4", "panic=-1", "mitigations=off", "nokaslr", "tsc=reliable"),
            *("audit=0", "apparmor=0", f'LAB_INIT="{HERE / "init.sh"}"', f'LAB_MODULES="{kernel.modules}"'),
            *(f'LAB_JOB="{self.directory}"', "LAB_SHARE=9p", "LAB_OUTPUT=/dev/ttyS1"),
        ]
        return [
            *("setpriv", "--pdeathsig", "KILL"),
            *("qemu-system-x86_64", "-M", "q35,hpet=off", *self.processor, "-smp", "1"),
            *("-m", str(self._memory_mb), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-net", "none", *shares, "-kernel", str(kernel.image), "-initrd", str(self._initramfs(kernel))),
            *(
                "-chardev",
                "file,id=console,path=/dev/stderr,append=on",
                "-serial",
                "chardev:console",
                "-serial",
                "stdio",
            ),
            *("-append", " ".join(arguments)),
        ]

    def _initramfs(self, kernel: Kernel) -> Path:
        """Return the archive that the kernel needs to read the host's files: a shell, modules in their order, a script."""
        tree = self.directory / "initramfs"
        for name in ("bin", "dev", "modules", "root"):
            (tree / name).mkdir(parents=True)
        shutil.copy(str(shutil.which("busybox", path=PATH)), tree / "bin" / "busybox")
        shutil.copy(HERE / "initramfs.sh", tree / "init")
        release = kernel.modules.name
        at = str(kernel.modules.parents[2])
        lines = [_run("modprobe", "-d", at, "-S", release, "--show-depends", name) for name in _ROOT_MODULES]
        for number, module in enumerate(dict.fromkeys(re.findall(r"^insmod (\S+)", "".join(lines), re.MULTILINE))):
            shutil.copy(module, tree / "modules" / f"{number:02}-{Path(module).name}")
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        archive = self.directory / "initramfs.cpio"
        with archive.open("wb") as out:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", "newc"],
                input=names.encode(),
                stdout=out,
                cwd=tree,
                check=True,
                timeout=60,
            )
        return archive


class QemuKvm(Qemu):
    """The same on the machine's own processor."""

    name = "QEMU with KVM"
    start_s = 30.0
    processor: ClassVar = ("-accel", "kvm", "-cpu", "host")

    @classmethod
    def unfit(cls) -> str | None:
        """Return why this kind can never start here, whatever is installed, or None."""
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "/dev/kvm is not there, or not for this user"
        return super().unfit()
