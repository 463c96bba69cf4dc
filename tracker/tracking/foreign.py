"""What a tracking server sends: names that are no paths, and no more bytes than there can be.

A cell's files are shards of 32 documents, their texts and two small notes. Whatever a server says
of them, each is a plain name beside the others and has at most `LARGEST` bytes, and unpacked they
fit into `UNPACKED` bytes of memory. A longer answer ends where the limit is, packed or not, since
the system limits what the process writes, and that of `ForeignFiles` what it holds. Systems without
such limits (Windows; for memory macOS too) have the names and the stated sizes alone.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from tracker.core.errors import TrackingError
from tracker.ledger.shards import read_shard

LARGEST = 2**28
"""Bytes of a file that is downloaded."""
MANY = 100_000
"""Files of a cell: shards and texts of more than a million documents."""
UNPACKED = 2**31
"""Bytes that a cell's shards and texts take in memory."""


def refuse_lies(sizes: Mapping[str, int | None]) -> None:
    """Refuse files that are none of tracker's, before one is downloaded.

    Args:
        sizes: Bytes of each by its name; None where the server does not say.

    Raises:
        TrackingError: A name leads elsewhere, or they are too large or too many.
    """
    for name, size in sizes.items():
        parts = {PurePosixPath(name).name, PureWindowsPath(name).name}
        if parts != {name} or name in ("", "..") or "\0" in name:
            raise TrackingError(
                f"the server names a file {name!r}, which is no plain name; it is not downloaded"
            )
        if (size or 0) > LARGEST:
            raise TrackingError(f"the server says that {name!r} has {size} bytes; {_SO_MANY}")
    if len(sizes) > MANY:
        raise TrackingError(f"the server names {len(sizes)} files; a benchmark has at most {MANY}")


_SO_MANY = f"no file of tracker's has more than {LARGEST // 2**20} MiB, and it is not downloaded"


@contextmanager
def downloading(folder: Path) -> Iterator[None]:
    """End a download to a folder at `LARGEST` bytes a file.

    Args:
        folder: Where the files arrive.

    Yields:
        Nothing.

    Raises:
        TrackingError: A file has more.
    """
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [each for each in (LARGEST, before, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), hard))
    try:
        yield
    except Exception as error:
        # MLflow's client keeps the cause to itself, and W&B's downloads to its own cache first.
        full = any(path.stat().st_size >= LARGEST for path in folder.rglob("*"))
        if full or os.strerror(errno.EFBIG) in str(error):
            raise TrackingError(f"the server sends a file without end; {_SO_MANY}") from None
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


class ForeignFiles:
    """Reads what was downloaded in a process that may not hold more than `UNPACKED` bytes of it."""

    def __init__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = UNPACKED if hard == resource.RLIM_INFINITY else min(UNPACKED, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))

    def refuse_bombs(self, paths: Collection[Path]) -> None:
        """Read shards or texts as whoever shows them does; TrackingError if that is impossible."""
        what, held = "its files are not what tracker writes:", []
        for path in paths:
            try:
                table = read_shard(path.read_bytes()).table
                held.append((table, table.to_pandas()))
            except ValueError as error:
                what = f"{what} {path.name} is no shard of this benchmark: {error}"
                raise TrackingError(what) from None
            except MemoryError:
                what = f"{what} with {path.name} they take more than {UNPACKED // 2**30} GiB"
                raise TrackingError(what) from None
