"""Write files atomically, with locks and digests.

Notes are small JSON files with a digest of their content, so that damage and edits are noticed.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from tracker.core.errors import WorkError
from tracker.core.provenance import content_hash


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it, rename it, and flush its folder.

    A `stream` is written directly, since a rename would replace it.

    Args:
        path: The path of the file.
        write: Function that writes the whole content to a given path.

    Raises:
        WorkError: The disk is full or not writable; no partial file is left.
    """
    # Not named by process id: two containers on one shared disk may both be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        if (output := stream(path)) is not None:
            with TemporaryDirectory() as folder:
                write(copy := Path(folder, path.name))
                with open(output, "wb", closefd=output is path) as opened:
                    opened.write(copy.read_bytes())
            return
        changed = [path.parent]
        while not changed[-1].exists():
            changed.append(changed[-1].parent)
        make_folder(path.parent)
        write(temporary)
        share(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush(changed)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = "the disk is full" if full else error.strerror or str(error)
        if isinstance(error, PermissionError):
            why = f"{path.parent} is {owner_of(path.parent)}'s, and you may not write it"
        raise WorkError(
            f"{path} cannot be written: {why}. What was measured before is safe; "
            "mend it and type the same command to continue."
        ) from None
    finally:
        # No failure, Ctrl-C included, leaves a partial file behind.
        with suppress(OSError):
            temporary.unlink()


def stream(path: Path) -> Path | int | None:
    """Return the standard stream's descriptor, or the device or pipe, at a path; else None."""
    with suppress(OSError):
        status = path.stat()
        for descriptor in (1, 2):
            with suppress(OSError):
                if os.path.samestat(status, os.fstat(descriptor)):
                    return descriptor
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return path
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def lock_file(path: Path, patience: float = -1) -> FileLock:
    """Return a lock between processes, not held yet, and create its folder if needed.

    Raises WorkError if it cannot be created. `patience` is the timeout in seconds; a negative one
    waits forever.
    """
    try:
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        mode = 0o644 | _opened(path.parent.stat())
    except OSError as error:
        raise WorkError(f"{path} cannot be made: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.R_OK | os.W_OK):
        raise WorkError(
            f"{path} is {owner_of(path)}'s, and you may not write it. Who shares a folder lets a "
            f"group write it: chmod -R g+rwX {shlex.quote(str(path.parent))}"
        )
    return FileLock(path, timeout=patience, mode=mode)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, with the write permissions of the folder above."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        share(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is moved to a path at the end, or removed on failure.

    Its lock distinguishes folders in use from those of killed processes, which are removed here.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.lock"):
        with suppress(OSError, WorkError), lock_file(left, patience=0):
            shutil.rmtree(left.with_suffix(".tmp"), ignore_errors=True)
            if not left.with_suffix(".tmp").exists():
                left.unlink()
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with lock_file(folder.with_suffix(".lock")):
            folder.mkdir()
            share(folder)
            yield folder
            mode = folder.stat().st_mode
            for inner in folder.rglob("*"):  # safetensors writes files of mode 0600
                opened = mode & (0o7777 if inner.is_dir() else 0o666)
                inner.chmod(stat.S_IMODE(inner.stat().st_mode) | opened)
            folder.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)


def share(path: Path) -> None:
    """Give a new file the write permissions of its folder, ignoring the umask.

    Otherwise one user's locks and notes would stop other users of a shared folder.
    """
    with suppress(OSError):  # another user's
        own, above = path.stat(), path.parent.stat()
        more = _opened(above) if own.st_gid == above.st_gid else _opened(above) & 0o006
        if stat.S_ISDIR(own.st_mode) and more:
            more |= (more & 0o022) >> 1 | above.st_mode & stat.S_ISGID
        if more & ~own.st_mode:
            path.chmod(stat.S_IMODE(own.st_mode) | more)


@contextmanager
def as_shared(folder: Path) -> Iterator[None]:
    """Set the umask to a folder's write permissions inside a `with` block, for all threads."""
    before = os.umask(0)
    opened = _opened(folder.stat())
    os.umask(before & ~(opened | (opened & 0o022) >> 1))
    try:
        yield
    finally:
        os.umask(before)


def _opened(folder: os.stat_result) -> int:
    """Return the mode bits of group and others that a folder's permissions grant its files."""
    more = 0o060 if folder.st_mode & stat.S_IWGRP else 0
    everybody = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
    return more | (0o006 if everybody else 0)


def owner_of(path: Path) -> str:
    """Return the owner of a file or folder, or of its nearest existing parent."""
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    try:
        return there.owner()
    except (KeyError, NotImplementedError, OSError):
        return f"user {there.lstat().st_uid}"


def closed(folder: Path) -> str:
    """Return what to do about an unreadable file or folder; empty if readable or missing."""
    if not os.path.lexists(folder):
        return ""
    if os.access(folder, os.R_OK | (os.X_OK if folder.is_dir() else 0)):
        return ""
    return (
        f"it is {owner_of(folder)}'s, and you may not read it; ask for: "
        f"chmod -R g+rX {shlex.quote(str(folder))}"
    )


def _flush(folders: Iterable[Path]) -> None:
    """Flush the entries of folders where the platform can; without it a rename may be lost."""
    for folder in folders:
        with suppress(OSError):
            entries = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(entries)
            finally:
                os.close(entries)


_DIGEST = "digest"
_FILE = "file"
"""Key of the file's name in a note, so that a copy of another note is recognised."""


def sealed(content: Mapping[str, Any]) -> str:
    """Return a note's text with a digest; `content` is JSON without the key `digest`."""
    return json.dumps({**content, _DIGEST: content_hash(content)}, indent=2)


def unsealed(text: str | bytes, name: str | None = None) -> dict[str, Any]:
    """Return the content of a note's text; raise ValueError if it is no note or damaged.

    Args:
        text: The text.
        name: Expected name of its file; None for any. Notes of former versions have no name.

    Returns:
        The content, without digest and name.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if content.pop(_DIGEST, None) != content_hash(content):
        raise ValueError("its digest is not that of what it says: it was edited or damaged")
    original = content.pop(_FILE, None)
    if name is not None and original not in (None, name):
        raise ValueError(f"it is a copy of {original}")
    return content


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note atomically; its digest covers the file's name."""
    write_text(path, sealed({**content, _FILE: path.name}))


def read_note(path: Path) -> dict[str, Any]:
    """Read a note that can be recreated; empty if it is missing or damaged."""
    try:
        return unsealed(path.read_bytes(), path.name)
    except (OSError, ValueError):
        return {}


def reason(error: OSError | ValueError) -> str:
    """Return a short reason why a file cannot be used."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0]
