"""The SQLite file of MLflow's runs, for whoever has no server."""

from __future__ import annotations

import logging
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import psutil

# "Creating initial MLflow database tables...": nothing that a user of tracker must read.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

_NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|afs|orangefs|pvfs|9p|fuse\.sshfs", re.IGNORECASE
)


def artifact_folder(database: Path) -> Path:
    """Say where the files of its runs lie: beside it."""
    return database.parent / "mlartifacts"


def create_database(path: Path) -> None:
    """Create the SQLite file, or find out quickly that the one there cannot be used.

    MLflow's migrations take seconds and cannot be repeated when they are interrupted, so they run
    on a draft that is renamed when it is complete. The caller holds the lock.
    """
    if path.exists() and path.stat().st_size:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
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


def _on_local_disk(folder: Path) -> bool:
    """Say whether SQLite's write-ahead log is safe here: it is not on network file systems."""
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if folder.resolve().is_relative_to(mount.mountpoint)
    ]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is None or not _NETWORK_FILE_SYSTEMS.search(nearest.fstype)
