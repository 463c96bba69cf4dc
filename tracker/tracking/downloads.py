"""Check the files that a tracking server sends: plain names, of a limited size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from tracker.core.errors import TrackingError
from tracker.tracking.identity import files_digest

if TYPE_CHECKING:
    from tracker.tracking.base import RemoteCell

LARGEST_FILE = 2**28
"""Maximum number of bytes of a downloaded file; a shard has 32 documents."""


def check_listing(sizes: Mapping[str, int | None]) -> None:
    """Check a server's list of files before any is downloaded.

    Args:
        sizes: Name of each file → its bytes; None if the server does not give them.

    Raises:
        TrackingError: A name is no plain file name, or a file is too large.
    """
    for name, size in sizes.items():
        plain_names = {PurePosixPath(name).name, PureWindowsPath(name).name}
        if plain_names != {name} or name in ("", "..") or "\0" in name:
            raise TrackingError(
                f"the server names a file {name!r}, which is no plain name; it is not downloaded"
            )
        _check_size(name, size or 0)


def check_downloaded(folder: Path, cell: RemoteCell | None = None) -> None:
    """Check downloaded files, independently of the server's list.

    Args:
        folder: The folder of the files.
        cell: The cell whose version the files must match; None if the client compares them.

    Raises:
        TrackingError: A file is too large, or the files differ from those attached.
    """
    for path in folder.iterdir():
        _check_size(path.name, path.stat().st_size)
    if cell is not None and files_digest(folder.iterdir()) != cell.version:
        raise TrackingError(f"the files of {cell.name!r} are not those that were attached")


def _check_size(name: str, size: int) -> None:
    if size > LARGEST_FILE:
        raise TrackingError(
            f"the server's file {name!r} has {size} bytes; "
            f"no file of tracker's has more than {LARGEST_FILE // 2**20} MiB"
        )
