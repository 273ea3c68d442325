"""Replaces a file as a whole. A reader finds the old or the new content, also after a power failure."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content. Mode, owner and symbolic links to it stay. After an OSError the file is as it was."""
    target = path.resolve(strict=True)
    kept = target.stat()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            os.fchown(handle, kept.st_uid, kept.st_gid)
            os.fchmod(handle, kept.st_mode & 0o7777)  # after fchown, which clears set-id bits
            out.flush()
            os.fsync(handle)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
