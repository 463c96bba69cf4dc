"""Writing files so that a reader sees all of a file or none of it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from tracker.errors import WorkError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, flush it to the disk, rename it, and flush its folder.

    Args:
        path: Where the file is to be.
        write: Writes the whole content to the path that it is given.

    Raises:
        WorkError: The disk is full or refuses; nothing half-written is left.
    """
    # Not named by process id: two containers on one shared disk may both be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        changed = [path.parent]
        while not changed[-1].exists():
            changed.append(changed[-1].parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush(changed)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = "the disk is full" if full else error.strerror or str(error)
        raise WorkError(
            f"{path} cannot be written: {why}. What was measured before is safe; "
            "mend it and type the same command to continue."
        ) from None
    finally:
        # Whatever went wrong, Ctrl-C included, leaves no half-written file behind.
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: _write(temporary, content))


def lock_file(path: Path, patience: float = -1) -> FileLock:
    """Make a lock that processes share, not held yet; its folder is made where there is none.

    WorkError if there is no place for it. `patience` is how many seconds it is waited for; below 0
    without end.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise WorkError(f"{path} cannot be made: {error.strerror}") from None
    return FileLock(path, timeout=patience)


def _flush(folders: Iterable[Path]) -> None:
    """Flush what stands in folders, where the platform can: a rename is lost without it."""
    for folder in folders:
        with suppress(OSError):
            entries = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(entries)
            finally:
                os.close(entries)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
