"""Read and write a per-user cache; ignore entries that other users may have written.

An entry is trusted only if its owner and permissions show that no user except this user and root
can have written it. An entry that is not trusted is computed again. On systems other than POSIX,
every entry is trusted.

Results of self-checks are stored in the results folder and in the cache. If other users can write
to a results folder, only the cache is trusted.
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

from tracker.ledger.files import read_note, write_note
from tracker.schema.errors import WorkError

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_REACHABLE_BY_OTHERS = stat.S_IXGRP | stat.S_IXOTH
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of the cache.

    The environment variable TRACKER_CACHE names the folder. The default is the user's cache folder,
    or a temporary folder if there is no home folder.
    """
    if setting := os.environ.get("TRACKER_CACHE"):
        return Path(setting)
    with suppress(RuntimeError):  # older platformdirs return the path with its ~
        if (folder := platformdirs.user_cache_path("tracker")).is_absolute():
            return folder
    folder = _temporary_folder("cache")
    os.environ["TRACKER_CACHE"] = str(folder)  # for child processes
    log.warning(
        "there is no home folder, so the temporary folder %s is used as the cache and is removed "
        "at the end of the run. To keep the cache, set TRACKER_CACHE to a folder",
        folder,
    )
    return folder


def is_private(path: Path, root: Path) -> bool:
    """Return whether only this user and the administrator can have written a file or folder.

    Owner and permissions of `path` and of all folders up to `root` are checked. A link is not
    private, unless the link is `root`. OSError is raised if `path` is missing.
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
    """Return a cache entry's content; empty if the entry is missing, damaged or not trusted."""
    return read_trusted(cache_folder(), kind, key)


def keep(kind: str, key: str, content: Mapping[str, Any]) -> None:
    """Write an entry to the user's cache, unless other users can write to the cache.

    The function `recall` returns `content` for the same `kind` and `key`. A cache that is not
    writable is ignored.
    """
    root = cache_folder()
    with suppress(OSError, WorkError):
        _make_private(root / kind)
        if _is_trusted(root / kind, root):
            write_note(note_path(root, kind, key), content)


def read_trusted(root: Path, kind: str, key: str) -> dict[str, Any]:
    """Return an entry's content; {} if the entry is missing, damaged or not trusted."""
    path = note_path(root, kind, key)
    with suppress(OSError):
        path.lstat()
        if _is_trusted(path, root):
            return read_note(path)
    return {}


def note_path(root: Path, kind: str, key: str) -> Path:
    """Return the file path of the cache entry with a given kind and key; the key is a hash."""
    return root / kind / f"{key[:32]}.json"


def private_folder(name: str) -> Path:
    """Return a folder in the cache that only this user and root can write to.

    The folder is created if needed. If the folder is not trusted, a temporary folder is returned.
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
    """Log a warning, once per cache folder, that the folder is not trusted."""
    log.warning(
        "the cache %s is not used, because another user owns it or can write to it. If it is "
        "yours, type: chmod -R go-w %s; otherwise set TRACKER_CACHE to another folder",
        *(root, shlex.quote(str(root))),
    )


def _make_private(folder: Path) -> None:
    """Create a folder and its missing parents with permissions for this user only."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


_DRAFTS_KIND = "drafts"


class Drafts:
    """Cache of generated texts of documents whose outcomes are not complete yet.

    If a run is interrupted before a document is complete, the next run reads the generated texts
    from the cache instead of generating them again.
    """

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def recall(self, key: str) -> list[Any] | None:
        """Return the texts that are cached under a key; None if there are none."""
        self._keys.add(key)
        texts = recall(_DRAFTS_KIND, key).get("texts")
        return texts if isinstance(texts, list) else None

    def keep(self, key: str, texts: list[Any]) -> None:
        """Write texts to the cache."""
        keep(_DRAFTS_KIND, key, {"texts": texts})

    def clear(self) -> None:
        """Delete the cached texts of each key for which `recall` was called."""
        for key in self._keys:
            with suppress(OSError):
                note_path(cache_folder(), _DRAFTS_KIND, key).unlink()
        self._keys = set()


_CHECKS_KIND = "checks"


class Checks:
    """Storage of self-check results (verdicts) in the results folder and in the cache."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def recall(self, key: str) -> str | None:
        """Return a stored self-check result (verdict); None if there is none for the key."""
        for root in (self._root, cache_folder()):
            verdict = read_trusted(root, _CHECKS_KIND, key).get("verdict")
            if verdict is not None:
                if not note_path(self._root, _CHECKS_KIND, key).exists():
                    self._write_note(key, verdict)
                return str(verdict)
        return None

    def keep(self, key: str, verdict: str) -> None:
        """Write a self-check result to the results folder and the cache, ignoring write errors."""
        self._write_note(key, verdict)
        keep(_CHECKS_KIND, key, {"verdict": verdict})

    def _write_note(self, key: str, verdict: str) -> None:
        with suppress(WorkError):
            write_note(note_path(self._root, _CHECKS_KIND, key), {"verdict": verdict})
