from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tracker.ledger.files import new_folder, write_atomically, write_text
from tracker.schema.errors import WorkError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_are_replaced_atomically(tmp_path):
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
def test_temporary_names_are_unique(tmp_path):
    path = tmp_path / "file.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("outer")
        write_text(path, "inner")
        assert temporary.read_text() == "outer"

    write_atomically(path, write)
    assert path.read_text() == "outer"
    assert names(tmp_path) == {"file.txt"}


# Was: after a power cut the rename, or the new folder, could be gone though the file was flushed.
def test_the_folders_entry_is_flushed_after_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "file.txt"
    flushed = []

    def fsync(file: int) -> None:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            flushed.append((status.st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "first")
    folders = (path.parent, tmp_path / "new", tmp_path)
    assert flushed == [(folder.stat().st_ino, True) for folder in folders]
    del flushed[:]
    write_text(path, "second")
    assert flushed == [(path.parent.stat().st_ino, True)]


# Was: only an OSError cleans up, so a temporary file is left for good.
# A writer may fail with what is no OSError: pyarrow's ArrowInvalid is a ValueError, Ctrl-C a
# KeyboardInterrupt.
@pytest.mark.parametrize("error", [OSError(5, "no"), ValueError("bad"), KeyboardInterrupt])
def test_a_failing_writer_leaves_nothing(tmp_path, error):
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
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("without a number"), "without a number"),
    ],
    ids=str,
)
def test_system_errors_are_explained(tmp_path, error, message):
    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(WorkError, match=f"file.txt cannot be written: {message}") as caught:
        write_atomically(tmp_path / "file.txt", write)
    assert caught.value.exit_code == 1


# Was: unlink(missing_ok=True) raises NotADirectoryError inside the handler.
def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkError, match="cannot be written"):
        write_text(tmp_path / "file" / "x.txt", "text")
    assert (tmp_path / "file").read_text() == "in the way"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("mask", "parent", "file", "folder"),
    [
        (0o022, 0o755, 0o644, 0o755),
        (0o027, 0o755, 0o640, 0o750),
        (0o077, 0o755, 0o600, 0o700),
        (0o077, 0o2770, 0o660, 0o2770),
        (0o022, 0o777, 0o666, 0o777),
    ],
)
def test_a_new_folder_follows_the_umask_and_its_parent(tmp_path, mask, parent, file, folder):
    """Was: weights of safetensors, which asks for 0600, could be read by nobody else."""
    tmp_path.chmod(parent)
    with umask(mask), new_folder(tmp_path / "out") as new:
        (new / "inner").mkdir()
        for path in (new / "model.safetensors", new / "inner" / "model.safetensors"):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        (new / "config.json").write_text("{}")
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    assert modes == {
        "out": folder,
        "out/inner": folder,
        "out/config.json": file,
        "out/model.safetensors": file,
        "out/inner/model.safetensors": file,
    }


class TestKilled:
    """Left-overs of a killed process beside the folder that it was writing."""

    _PROGRAM = """
import sys
from pathlib import Path
from tracker.ledger.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_text("weights")
    print(folder, flush=True)
    sys.stdin.read()
"""

    @pytest.fixture
    def writer(self, tmp_path) -> Iterator[subprocess.Popen]:
        command = (sys.executable, "-c", self._PROGRAM, tmp_path / "out")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as program:
            assert program.stdout.readline()
            yield program
            program.kill()

    def test_leftovers_are_removed_by_the_next_writer(self, tmp_path, writer):
        assert [path.suffix for path in tmp_path.glob(".*/*")] == [".safetensors"]
        writer.kill()
        writer.wait()
        with new_folder(tmp_path / "out") as folder:
            assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
        assert names(tmp_path) == {"out"}

    def test_folders_in_use_are_not_removed(self, tmp_path, writer):
        with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out"):
            raise ZeroDivisionError
        (file,) = tmp_path.glob(".out.*.tmp/*")
        assert file.read_text() == "weights"
        writer.communicate()
        assert names(tmp_path) == {"out"}


class TestStreams:
    """Only a file is replaced: a link stands for the device, as root could replace it itself."""

    def test_a_device_is_written_to(self, tmp_path):
        path = tmp_path / "null"
        path.symlink_to("/dev/null")
        write_text(path, "text")
        assert stat.S_ISCHR(path.stat().st_mode)
        assert names(tmp_path) == {"null"}

    @pytest.mark.parametrize("mode", ["wb", "ab", "pipe"])
    def test_standard_output_is_written_directly(self, tmp_path, mode):
        path, file = tmp_path / "stdout", tmp_path / "file.txt"
        path.symlink_to("/dev/stdout")
        file.write_text("" if mode == "wb" else "before\n")
        code = (
            "import sys; from pathlib import Path; from tracker.ledger.files import write_text\n"
            "print('first', flush=True); write_text(Path(sys.argv[1]), 'page\\n'); print('last')"
        )
        command = (sys.executable, "-c", code, path)
        if mode == "pipe":
            assert subprocess.check_output(command) == b"first\npage\nlast\n"
        else:
            with file.open(mode) as output:
                subprocess.check_call(command, stdout=output)
            before = "before\n" * (mode == "ab")
            assert file.read_text() == f"{before}first\npage\nlast\n"
        assert path.is_symlink()

    def test_a_device_that_refuses_is_named(self, tmp_path):
        (tmp_path / "full").symlink_to("/dev/full")
        with pytest.raises(WorkError, match="full cannot be written: the disk is full"):
            write_text(tmp_path / "full", "text")
