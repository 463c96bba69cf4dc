"""Create the SQLite file in which MLflow stores runs if no server is configured."""

from __future__ import annotations

import logging
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil

from tracker.ledger.files import share_with_group

# Hides "Creating initial MLflow database tables...".
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

_NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|afs|orangefs|pvfs|9p|fuse\.sshfs", re.IGNORECASE
)
_ARTIFACTS_FOLDER = "mlartifacts"
_TRACKER_FOLDER = re.compile(rf"(file:.*/{_ARTIFACTS_FOLDER})(?:/.*)?")
_ADDRESS_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database that hold addresses of files."""


def artifact_folder(database: Path) -> Path:
    """Return the folder for the artifacts of runs, next to the database file."""
    return database.parent / _ARTIFACTS_FOLDER


def create_database(path: Path) -> None:
    """Create MLflow's SQLite file, or check that an existing file can be used.

    MLflow cannot complete a partly created file. Therefore, the file has a temporary name until it
    is complete. The caller must hold the project's write lock.
    """
    if path.exists() and path.stat().st_size:
        update_addresses(path)
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
    share_with_group(path)


def update_addresses(path: Path) -> None:
    """Correct the stored artifact paths after the database and the artifacts were moved or copied.

    MLflow stores absolute paths. With uncorrected paths, MLflow would continue to write to the old
    folder.
    """
    folder = artifact_folder(path)
    with closing(sqlite3.connect(path)) as database:
        columns = [
            (table, column)
            for table, column in _ADDRESS_COLUMNS
            if any(row[1] == column for row in database.execute(f"PRAGMA table_info({table})"))
        ]
        if _ADDRESS_COLUMNS[0] not in columns:
            return
        rows = database.execute("SELECT artifact_location FROM experiments").fetchall()
        matches = (_TRACKER_FOLDER.fullmatch(address or "") for (address,) in rows)
        for uri in {match[1] for match in matches if match}:
            old_folder = Path(url2pathname(urlsplit(uri).path))
            if old_folder.is_dir() and (
                not folder.is_dir()
                or old_folder.samefile(folder)
                # Without the original's database, the folder belongs to something else.
                or not old_folder.with_name(path.name).exists()
            ):
                continue
            n = len(uri) + 1
            with database:
                for table, column in columns:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (folder.as_uri(), n, uri, n, f"{uri}/"),
                    )


def _on_local_disk(folder: Path) -> bool:
    """Return whether a folder is on a local disk, where SQLite's write-ahead log is safe."""
    resolved, partitions = folder.resolve(), psutil.disk_partitions(all=True)
    mounts = [mount for mount in partitions if resolved.is_relative_to(mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is None or not _NETWORK_FILE_SYSTEMS.search(nearest.fstype)
