from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import platformdirs
import pytest

from tracker.core.errors import WorkError
from tracker.ledger.cache import cache_folder
from tracker.ledger.files import write_atomically, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writes_and_replaces(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    write_text(path, "second")
    assert path.read_text() == "second"
    assert names(path.parent) == {"file.txt"}


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        seen.append(path.read_text())
        # Beside its place: a rename is atomic only within one file system.
        seen.append(temporary.parent == path.parent)
        temporary.write_text("new")

    write_atomically(path, write)
    assert seen == ["old", True]
    assert path.read_text() == "new"


# Was: named by process id, which is 1 in every container.
def test_two_writers_with_one_process_id_share_no_temporary_name(tmp_path) -> None:
    path = tmp_path / "file.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("outer")
        write_text(path, "inner")
        assert temporary.read_text() == "outer"

    write_atomically(path, write)
    assert path.read_text() == "outer"
    assert names(tmp_path) == {"file.txt"}


# Was: after a power cut the rename, or the new folder, could be gone though the file was flushed.
def test_the_folders_entry_is_flushed_after_the_rename(tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    flushed = []

    def fsync(file: int) -> None:
        found = os.fstat(file)
        if stat.S_ISDIR(found.st_mode):
            flushed.append((found.st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "first")
    folders = (path.parent, tmp_path / "new", tmp_path)
    assert flushed == [(folder.stat().st_ino, True) for folder in folders]
    del flushed[:]
    write_text(path, "second")
    assert flushed == [(path.parent.stat().st_ino, True)]


def test_a_platform_that_cannot_flush_folders_still_writes(tmp_path, monkeypatch) -> None:
    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise PermissionError(errno.EACCES, "not of folders")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file.txt", "whole")
    assert (tmp_path / "file.txt").read_text() == "whole"


# Was: only an OSError cleans up, so a temporary file is left for good.
# A writer may fail with what is no OSError: pyarrow's ArrowInvalid is a ValueError, Ctrl-C a
# KeyboardInterrupt.
@pytest.mark.parametrize("error", [OSError(5, "no"), ValueError("bad"), KeyboardInterrupt])
def test_a_failing_writer_leaves_nothing(tmp_path, error: Exception) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises((WorkError, ValueError, KeyboardInterrupt)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file.txt"}


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("without a number"), "without a number"),
    ],
    ids=str,
)
def test_an_operating_system_error_says_what_it_is(tmp_path, error: OSError, why: str) -> None:
    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(WorkError) as caught:
        write_atomically(tmp_path / "file.txt", write)
    assert str(caught.value) == (
        f"{tmp_path / 'file.txt'} cannot be written: {why}. What was measured before is safe; "
        "mend it and type the same command to continue."
    )
    assert caught.value.exit_code == 1


def test_where_the_cache_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("TRACKER_CACHE", "")
    assert cache_folder() == platformdirs.user_cache_path("tracker")


# Was: unlink(missing_ok=True) raises NotADirectoryError inside the handler.
def test_a_file_where_a_folder_should_be(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkError, match="cannot be written"):
        write_text(tmp_path / "file" / "x.txt", "text")
    assert (tmp_path / "file").read_text() == "in the way"
