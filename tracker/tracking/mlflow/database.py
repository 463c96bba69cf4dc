"""Create the SQLite file of MLflow's runs, for users without a server."""

from __future__ import annotations

import logging
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil

from tracker.ledger.files import share

# Hides "Creating initial MLflow database tables...".
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

_NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|afs|orangefs|pvfs|9p|fuse\.sshfs", re.IGNORECASE
)
_FILES = "mlartifacts"
_OF_TRACKER = re.compile(rf"(file:.*/{_FILES})(?:/.*)?")
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow with addresses of files."""


def artifact_folder(database: Path) -> Path:
    """Return the folder of the runs' files, beside the database."""
    return database.parent / _FILES


def create_database(path: Path) -> None:
    """Create the SQLite file, or check quickly that an existing one can be used.

    MLflow's migrations take seconds and cannot be repeated when they are interrupted, so they run
    on a draft that is renamed when it is complete. The caller holds the lock.
    """
    if path.exists() and path.stat().st_size:
        follow_folder(path)
        return

    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    draft = path.with_name(f"{path.name}.draft")
    for suffix in ("", "-journal", "-shm", "-wal"):
        Path(f"{draft}{suffix}").unlink(missing_ok=True)
    if _on_local_disk(path.parent):
        # Three times as fast for runs that are logged one by one; it stays on in the file.
        with closing(sqlite3.connect(draft)) as database:
            database.execute("PRAGMA journal_mode=WAL")
    store = SqlAlchemyStore(f"sqlite:///{draft}", artifact_folder(path).as_uri())
    store.engine.dispose()
    draft.replace(path)
    share(path)


def follow_folder(path: Path) -> None:
    """Update the addresses of runs' files after the database was moved or copied with them.

    MLflow stores absolute addresses. It would continue to write to the former folder, which is
    missing, or belongs to the original of a copy.
    """
    here = artifact_folder(path)
    with closing(sqlite3.connect(path)) as database:
        there = {
            (table, column)
            for table, column in _ADDRESSES
            if any(row[1] == column for row in database.execute(f"PRAGMA table_info({table})"))
        }
        if _ADDRESSES[0] not in there:
            return
        rows = database.execute("SELECT artifact_location FROM experiments").fetchall()
        found = (_OF_TRACKER.fullmatch(address or "") for (address,) in rows)
        for old in {match[1] for match in found if match}:
            before = Path(url2pathname(urlsplit(old).path))
            if before.is_dir() and (
                not here.is_dir()
                or before.samefile(here)
                # Without the original's database, the folder belongs to something else.
                or not before.with_name(path.name).exists()
            ):
                continue
            with database:
                for table, column in there:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )


def _on_local_disk(folder: Path) -> bool:
    """Check whether SQLite's write-ahead log is safe: it is not on network file systems."""
    place, every = folder.resolve(), psutil.disk_partitions(all=True)
    mounts = [mount for mount in every if place.is_relative_to(mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is None or not _NETWORK_FILE_SYSTEMS.search(nearest.fstype)
