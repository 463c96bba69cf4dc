"""Keep a per-user cache, and decide when to trust it.

A digest shows that a note is intact, not who wrote it, and notes decide which tasks and models are
read and what is exact. So an entry is trusted only if no one but this user and root can have
written it, and is computed again otherwise. Owners and permissions, which POSIX has, decide that.
On other systems every entry is trusted.

Verdicts of checks of architectures and models are stored, so that each check runs once per user: in
the results folder, whose figures depend on them, and in the cache for other folders. A results
folder that others can write is not trusted. The cache is used instead, or the check runs again.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from tracker.core.errors import WorkError
from tracker.ledger.files import read_note, write_note

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_REACHABLE_BY_OTHERS = stat.S_IXGRP | stat.S_IXOTH
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return `TRACKER_CACHE`, the user's cache folder, or a temporary one if there is no home."""
    if setting := os.environ.get("TRACKER_CACHE"):
        return Path(setting)
    with suppress(RuntimeError):  # older platformdirs return the path with its ~
        if (folder := platformdirs.user_cache_path("tracker")).is_absolute():
            return folder
    folder = _temporary_folder("cache")
    os.environ["TRACKER_CACHE"] = str(folder)  # for child processes
    advice = "is used as the cache and removed at the end. To keep a cache, set TRACKER_CACHE"
    log.warning("there is no home folder; %s %s", folder, advice)
    return folder


def is_private(path: Path, root: Path) -> bool:
    """Check that only this user and root can have written a file or folder.

    Args:
        path: A file or folder in `root`, or `root`.
        root: The last folder that is checked.

    Returns:
        True if everything from the path to `root` is owned by this user or root, is no link, and
        cannot be both reached and written by others. A missing one raises OSError.
    """
    is_exposed = False
    for checked in (path, *path.parents):
        link = checked.lstat()
        # The root itself may be a link of the user's own.
        status = checked.stat() if checked == root else link
        if not {link.st_uid, status.st_uid} <= {0, os.geteuid()} or stat.S_ISLNK(status.st_mode):
            return False
        if stat.S_ISDIR(status.st_mode) and not status.st_mode & _REACHABLE_BY_OTHERS:
            is_exposed = False  # others cannot reach the contents
        is_exposed = is_exposed or bool(status.st_mode & _WRITABLE_BY_OTHERS)
        if checked == root:
            break
    return not is_exposed


def recall(kind: str, key: str) -> dict[str, Any]:
    """Read an entry of the cache; empty if it is missing or not trusted."""
    return read_trusted(cache_folder(), kind, key)


def keep(kind: str, key: str, content: Mapping[str, Any]) -> None:
    """Write an entry to the cache, if it can be written and would be trusted."""
    root = cache_folder()
    with suppress(OSError, WorkError):
        _make_private(root / kind)
        if _is_trusted(root / kind, root):
            write_note(note_path(root, kind, key), content)


def read_trusted(root: Path, kind: str, key: str) -> dict[str, Any]:
    """Read a note from a cache folder; empty if the note is missing or not trusted."""
    path = note_path(root, kind, key)
    with suppress(OSError):
        path.lstat()
        if _is_trusted(path, root):
            return read_note(path)
    return {}


def note_path(root: Path, kind: str, key: str) -> Path:
    """Return the path of the note with this key, which is a hash."""
    return root / kind / f"{key[:32]}.json"


def private_folder(name: str) -> Path:
    """Create a folder in the cache, so that files in it can be trusted.

    If it cannot be created, or it or a file in it is not trusted, an empty temporary folder for
    this process is returned instead.
    """
    root = cache_folder()
    folder = root / name
    with suppress(OSError):
        _make_private(folder)
        if all(_is_trusted(path, root) for path in (folder, *folder.rglob("*"))):
            return folder
    return _temporary_folder(name)


@cache
def _temporary_folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"tracker-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_trusted(path: Path, root: Path) -> bool:
    if is_private(path, root):
        return True
    _warn_untrusted(root)
    return False


@cache
def _warn_untrusted(root: Path) -> None:
    """Warn once that the cache is not trusted."""
    log.warning(
        "the cache %s is not used, because another user owns it or can write to it. If it is "
        "yours, type: chmod -R go-w %s; otherwise set TRACKER_CACHE to another folder",
        *(root, shlex.quote(str(root))),
    )


def _make_private(folder: Path) -> None:
    """Create a folder and its parents for this user only; existing ones stay unchanged."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


_CHECKS_KIND = "checks"


class Checks:
    """Verdicts of checks in a results folder, as text; each key is a hash of the check's inputs."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def recall(self, key: str) -> str | None:
        """Read a verdict; None if it is missing or not trusted."""
        for root in (self._root, cache_folder()):
            verdict = read_trusted(root, _CHECKS_KIND, key).get("verdict")
            if verdict is not None:
                if not note_path(self._root, _CHECKS_KIND, key).exists():
                    self._write_note(key, verdict)
                return str(verdict)
        return None

    def keep(self, key: str, verdict: str) -> None:
        """Write a verdict, if the folders can be written."""
        self._write_note(key, verdict)
        keep(_CHECKS_KIND, key, {"verdict": verdict})

    def _write_note(self, key: str, verdict: str) -> None:
        with suppress(WorkError):
            write_note(note_path(self._root, _CHECKS_KIND, key), {"verdict": verdict})
