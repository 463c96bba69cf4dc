"""The user's cache: what can be had again, kept to save the time, and whom it is believed.

A digest shows that a note is whole, not who wrote it, and a note decides where a task is read,
which model it is and what is exact. So an entry counts only where nobody but this user and root can
have written it, and is made again elsewhere. That is seen from owners and permissions, which POSIX
has; on other systems whatever stands in the folder is believed.

What checks of architectures and models have shown is kept, so that each is made once for a user:
in the results folder, whose figures rest on them, and in the user's cache, for the next folder. A
results folder that others can write is not believed: there the cache decides, or the check again.
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

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_PASSABLE = stat.S_IXGRP | stat.S_IXOTH
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return `TRACKER_CACHE`, the user's cache folder, or a temporary one if there is no home."""
    if chosen := os.environ.get("TRACKER_CACHE"):
        return Path(chosen)
    with suppress(RuntimeError):  # older platformdirs return the path with its ~
        if (folder := platformdirs.user_cache_path("tracker")).is_absolute():
            return folder
    folder = _for_this_process("cache")
    os.environ["TRACKER_CACHE"] = str(folder)  # for the programs that are started too
    log.warning(
        "there is no home folder; %s is used as the cache and removed at the end. Set "
        "TRACKER_CACHE to keep it",
        folder,
    )
    return folder


def only_mine(path: Path, root: Path) -> bool:
    """Say whether nobody but this user and root can have written what stands at a path.

    Args:
        path: A file or folder in `root`, or `root`.
        root: The folder down to which is looked.

    Returns:
        Whether all from the path to the root are owned by this user or root, none is a link, and
        others may write none that they can come to. OSError if one is not there.
    """
    exposed = False
    for place in (path, *path.parents):
        own = found = place.lstat()
        if place == root:
            found = place.stat()  # it may be a link of the user's own
        if not {own.st_uid, found.st_uid} <= {0, os.geteuid()} or stat.S_ISLNK(found.st_mode):
            return False
        if stat.S_ISDIR(found.st_mode) and not found.st_mode & _PASSABLE:
            exposed = False  # nobody else comes to what lies below
        exposed = exposed or bool(found.st_mode & _OTHERS)
        if place == root:
            break
    return not exposed


def recall(kind: str, key: str) -> dict[str, Any]:
    """Recall an entry of the cache; empty where there is none, or it is not to be believed."""
    return believed_note(cache_folder(), kind, key)


def keep(kind: str, key: str, content: Mapping[str, Any]) -> None:
    """Keep an entry in the cache, where that can be written and would be believed."""
    root = cache_folder()
    with suppress(OSError, WorkError):
        _make_private(root / kind)
        if _believed(root / kind, root):
            write_note(note_path(root, kind, key), content)


def believed_note(root: Path, kind: str, key: str) -> dict[str, Any]:
    """Read a note of the cache or of another folder; empty where it is not to be believed."""
    path = note_path(root, kind, key)
    with suppress(OSError):
        path.lstat()
        if _believed(path, root):
            return read_note(path)
    return {}


def note_path(root: Path, kind: str, key: str) -> Path:
    """Say where a note stands; its key is a hash."""
    return root / kind / f"{key[:32]}.json"


def own_folder(name: str) -> Path:
    """Make a folder in the cache whose files are believed.

    Where it, or a file in it, is not this user's alone, or it cannot be made, it is an empty one
    for the time of this process.
    """
    root = cache_folder()
    folder = root / name
    with suppress(OSError):
        _make_private(folder)
        if all(_believed(path, root) for path in (folder, *folder.rglob("*"))):
            return folder
    return _for_this_process(name)


@cache
def _for_this_process(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"tracker-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _believed(path: Path, root: Path) -> bool:
    if only_mine(path, root):
        return True
    _say(root)
    return False


@cache
def _say(root: Path) -> None:
    """Say once why what is kept is not used."""
    log.warning(
        "what is kept in %s is not used and is made again: others can write it, or it is "
        "another user's. Of a folder of your own: chmod -R go-w %s; else set TRACKER_CACHE",
        root,
        shlex.quote(str(root)),
    )


def _make_private(folder: Path) -> None:
    """Make a folder, and those above it, for this user alone; what is there stays as it is."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


_KIND = "checks"


class Checks:
    """The verdicts of a results folder, as text; each key is a hash of all that it follows from."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def recall(self, key: str) -> str | None:
        """Recall a verdict; None where none is kept, or it is not to be believed."""
        for root in (self._root, cache_folder()):
            verdict = believed_note(root, _KIND, key).get("verdict")
            if verdict is not None:
                if not note_path(self._root, _KIND, key).exists():
                    self._write(key, verdict)
                return str(verdict)
        return None

    def keep(self, key: str, verdict: str) -> None:
        """Keep a verdict, where the folders can be written."""
        self._write(key, verdict)
        keep(_KIND, key, {"verdict": verdict})

    def _write(self, key: str, verdict: str) -> None:
        with suppress(WorkError):
            write_note(note_path(self._root, _KIND, key), {"verdict": verdict})
