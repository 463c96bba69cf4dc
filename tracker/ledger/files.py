"""Write files atomically, with locks and digests.

A note is a small JSON file with a digest of its content.
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

from tracker.schema.errors import WorkError
from tracker.schema.provenance import content_hash


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it to `path`.

    A standard stream, device or pipe at `path` is written to directly.

    Args:
        path: The path of the file.
        write: Function that writes the whole content to a given path.

    Raises:
        WorkError: The disk is full or not writable; no partial file is left.
    """
    # Not named by process id: two containers on one shared disk may both be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        if (output := find_stream(path)) is not None:
            with TemporaryDirectory() as folder:
                write(copy := Path(folder, path.name))
                with open(output, "wb", closefd=output is path) as output_file:
                    output_file.write(copy.read_bytes())
            return
        changed_folders = [path.parent]
        while not changed_folders[-1].exists():
            changed_folders.append(changed_folders[-1].parent)
        make_folder(path.parent)
        write(temporary)
        share_with_group(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush(changed_folders)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if is_full else error.strerror or str(error)
        if isinstance(error, PermissionError):
            reason = write_problem(path.parent)
        raise WorkError(
            f"{path} cannot be written: {reason}. Earlier measurements are safe; solve the problem "
            "and type the same command to continue."
        ) from None
    finally:
        # No failure, Ctrl-C included, leaves a partial file behind.
        with suppress(OSError):
            temporary.unlink()


def find_stream(path: Path) -> Path | int | None:
    """Return the standard stream, device or pipe at a path; None for a file.

    A standard stream is returned as its file descriptor, and a device or pipe as its path.
    """
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


def lock_file(path: Path, timeout: float = -1) -> FileLock:
    """Build a file lock, which the caller must still acquire.

    The folder of the lock file is created if needed. Raises WorkError if the lock file cannot be
    created or written. `timeout` is the maximum waiting time in seconds; a negative number means no
    limit.
    """
    try:
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        mode = 0o644 | _shared_mode(path.parent.stat())
    except OSError as error:
        raise WorkError(f"{path} cannot be created: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.R_OK | os.W_OK):
        command = f"chmod -R g+rwX {shlex.quote(str(path.parent))}"
        raise WorkError(f"{write_problem(path)}. To share a folder with its group, type: {command}")
    return FileLock(path, timeout=timeout, mode=mode)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, with the write permissions of the parent folder."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        share_with_group(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` at the end, or deleted on failure.

    Temporary folders of killed processes are deleted first.
    """
    for lock_path in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.lock"):
        with suppress(OSError, WorkError), lock_file(lock_path, timeout=0):
            shutil.rmtree(lock_path.with_suffix(".tmp"), ignore_errors=True)
            if not lock_path.with_suffix(".tmp").exists():
                lock_path.unlink()
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with lock_file(folder.with_suffix(".lock")):
            folder.mkdir()
            share_with_group(folder)
            yield folder
            mode = folder.stat().st_mode
            for inner in folder.rglob("*"):  # safetensors writes files of mode 0600
                added_mode = mode & (0o7777 if inner.is_dir() else 0o666)
                inner.chmod(stat.S_IMODE(inner.stat().st_mode) | added_mode)
            folder.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)


def share_with_group(path: Path) -> None:
    """Give a new file the write permissions of its folder, ignoring the umask.

    In a shared folder, other users can then write the file.
    """
    with suppress(OSError):  # another user's
        status, parent = path.stat(), path.parent.stat()
        mode = _shared_mode(parent) & (0o666 if status.st_gid == parent.st_gid else 0o006)
        if stat.S_ISDIR(status.st_mode) and mode:
            # Who may write a folder must also enter it, and new files keep its group.
            mode |= (mode & 0o022) >> 1 | parent.st_mode & stat.S_ISGID
        if mode & ~status.st_mode:
            path.chmod(stat.S_IMODE(status.st_mode) | mode)


@contextmanager
def shared_umask(folder: Path) -> Iterator[None]:
    """Set the umask so that new files get the write permissions of a folder.

    The umask applies inside the `with` block and is restored at the end.
    """
    before = os.umask(0)
    added_mode = _shared_mode(folder.stat())
    os.umask(before & ~(added_mode | (added_mode & 0o022) >> 1))
    try:
        yield
    finally:
        os.umask(before)


def _shared_mode(folder: os.stat_result) -> int:
    """Return the permissions of group and others for new files in a folder."""
    group_mode = 0o060 if folder.st_mode & stat.S_IWGRP else 0
    is_public = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
    return group_mode | (0o006 if is_public else 0)


def owner_name(path: Path) -> str:
    """Return the user name of the owner of a file or folder.

    For a missing path, the owner of the nearest existing parent is returned. A user without a name
    is returned as `user NUMBER`.
    """
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    try:
        return existing.owner()
    except (KeyError, NotImplementedError, OSError):
        return f"user {existing.lstat().st_uid}"


def write_problem(path: Path) -> str:
    """Return an error message about a file or folder that this user cannot write."""
    return f"{path} belongs to {owner_name(path)}, and you have no permission to write it"


def access_problem(folder: Path) -> str:
    """Return an error message if a file or folder exists but is not readable, else ""."""
    if not os.path.lexists(folder):
        return ""
    if os.access(folder, os.R_OK | (os.X_OK if folder.is_dir() else 0)):
        return ""
    command = f"chmod -R g+rX {shlex.quote(str(folder))}"
    owner = owner_name(folder)
    return f"you have no permission to read this path; ask the owner ({owner}) to type: {command}"


def _flush(folders: Iterable[Path]) -> None:
    """Flush folders to disk if possible, so that a crash cannot undo the renaming of a file."""
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


def seal_note(content: Mapping[str, Any]) -> str:
    """Return a note as JSON text.

    A digest of `content` is added under the key `digest`.
    """
    return json.dumps({**content, _DIGEST: content_hash(content)}, indent=2)


def parse_note(text: str | bytes, name: str | None = None) -> dict[str, Any]:
    """Parse the text of a note; raise ValueError if the digest or file name is wrong.

    Args:
        text: The text of the note's file.
        name: Expected name of the note's file; None = any name.

    Returns:
        The content of the note, without digest and file name.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON text is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("the file contains no JSON object")
    if content.pop(_DIGEST, None) != content_hash(content):
        raise ValueError("the digest does not match the content: the file was edited or damaged")
    original = content.pop(_FILE, None)
    if name is not None and original not in (None, name):
        raise ValueError(f"the file is a copy of {original}")
    return content


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note atomically: JSON with the content, the file name and a digest."""
    write_text(path, seal_note({**content, _FILE: path.name}))


def read_note(path: Path) -> dict[str, Any]:
    """Return the content of a note; {} if the file is missing or damaged."""
    try:
        return parse_note(path.read_bytes(), path.name)
    except (OSError, ValueError):
        return {}


def error_reason(error: OSError | ValueError) -> str:
    """Return the reason why a file cannot be used, as one line of text."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        location = ".".join(map(str, problem["loc"]))
        return f"{location}: {problem['msg']}" if location else problem["msg"]
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0]
