"""A machine's cache is trusted only where nobody else can have written it."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tracker.ledger import cache as caching
from tracker.ledger.cache import Checks, keep, note_path, private_folder, recall

KEY, OTHER_KEY = "0123456789abcdef" * 4, "f" * 64
SAID = {"what": "was found"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Point to a user cache that does not exist yet, as in a fresh process."""
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "home" / "cache"))
    caching._warn_untrusted.cache_clear()
    caching._temporary_folder.cache_clear()
    return tmp_path / "home" / "cache"


@pytest.fixture
def give_away(monkeypatch) -> Callable[[Path], None]:
    """Give a file to another user; without root, pretend to be another user."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 4321, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 4321)

    return give


def test_entries_are_read_back_and_private(cache):
    before = os.umask(0o002)
    try:
        keep("tasks", KEY, SAID)
        assert recall("tasks", KEY) == SAID
        assert recall("tasks", OTHER_KEY) == {}
        for folder in (cache, cache.parent, cache / "tasks"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        # A user's own, made by hand.
        cache.chmod(0o755)
        (cache / "tasks").chmod(0o755)
        note_path(cache, "tasks", KEY).chmod(0o644)
        assert recall("tasks", KEY) == SAID
    finally:
        os.umask(before)


def cache_part(cache: Path, part: str) -> Path:
    note = note_path(cache, "tasks", KEY)
    return {"the cache": cache, "a folder of it": note.parent, "the note": note}[part]


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("part", ["the cache", "a folder of it", "the note"])
def test_entries_that_others_can_write_are_ignored_with_one_warning(cache, part, mode, caplog):
    """Was: whatever stood there was believed."""
    keep("tasks", KEY, SAID)
    for folder in (cache, cache / "tasks"):
        folder.chmod(0o755)
    note = note_path(cache, "tasks", KEY)
    cache_part(cache, part).chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert recall("tasks", KEY) == recall("tasks", KEY) == {}
    (message,) = caplog.messages
    assert f"chmod -R go-w {cache}" in message
    if part == "the note":  # it is written anew, in a folder that is the user's alone
        keep("tasks", KEY, SAID)
        assert recall("tasks", KEY) == SAID
    else:
        before = note.read_bytes()
        keep("tasks", KEY, {"what": "else"})
        assert note.read_bytes() == before


@pytest.mark.parametrize("part", ["the cache", "a folder of it", "the note"])
def test_entries_of_other_users_are_ignored(cache, part, give_away):
    keep("tasks", KEY, SAID)
    give_away(cache_part(cache, part))
    assert recall("tasks", KEY) == {}


def test_links_inside_the_cache_are_ignored(cache, tmp_path):
    keep("tasks", KEY, SAID)
    (cache / "tasks").rename(tmp_path / "elsewhere")
    (cache / "tasks").symlink_to(tmp_path / "elsewhere")
    assert recall("tasks", KEY) == {}
    (cache / "tasks").unlink()
    (tmp_path / "elsewhere").rename(cache / "tasks")
    cache.rename(tmp_path / "scratch")
    cache.symlink_to(tmp_path / "scratch")
    assert recall("tasks", KEY) == SAID


def test_verdicts_in_shared_folders_are_ignored(tmp_path, cache):
    """Was: one user's verdict, or a planted one, decided for all who share a results folder."""
    shared, checks = tmp_path / "shared", Checks(tmp_path / "shared")
    checks.keep(KEY, "sound")
    for folder in (shared, shared / "checks"):
        folder.chmod(0o2775)
    assert Checks(shared).recall(KEY) == "sound"  # this user's own cache has it
    note_path(cache, "checks", KEY).unlink()
    assert Checks(shared).recall(KEY) is None
    checks.keep(KEY, "unsound")
    assert Checks(shared).recall(KEY) == "unsound"


def test_private_folders_contain_only_files_of_the_user(cache, give_away):
    folder = private_folder("project")
    assert folder == cache / "project"
    (folder / "cells").mkdir()
    (folder / "cells" / "shard").write_text("")
    assert private_folder("project") == folder
    give_away(folder / "cells" / "shard")
    temporary = private_folder("project")
    assert temporary != folder
    assert not list(temporary.iterdir())
    assert private_folder("project") == temporary  # for the time of a process


class TestChecks:
    """Verdicts of checks, in a results folder and in the user's cache."""

    def test_verdicts_are_read_back(self, tmp_path):
        checks = Checks(tmp_path)
        assert checks.recall(KEY) is None
        checks.keep(KEY, "sound")
        checks.keep(OTHER_KEY, "unsound")
        assert Checks(tmp_path).recall(KEY) == "sound"
        assert Checks(tmp_path).recall(OTHER_KEY) == "unsound"
        # Where `tracker check` looks for them.
        assert (tmp_path / "checks" / f"{KEY[:32]}.json").is_file()

    def test_edited_verdicts_are_ignored(self, tmp_path, cache):
        Checks(tmp_path).keep(KEY, "unsound")
        for folder in (tmp_path, cache):
            (path,) = (folder / "checks").iterdir()
            path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "sound"}))
        assert Checks(tmp_path).recall(KEY) is None

    def test_verdicts_are_copied_between_folders_of_a_user(self, tmp_path):
        roots = tmp_path / "first", tmp_path / "second"
        Checks(roots[0]).keep(KEY, "sound")
        assert Checks(roots[1]).recall(KEY) == "sound"
        # Its figures rest on the verdict from now on, so it goes where they go.
        first, second = (note_path(root, "checks", KEY).read_text() for root in roots)
        assert first == second
        assert Checks(roots[1]).recall(OTHER_KEY) is None

    def test_unwritable_folders_raise_no_error(self, tmp_path, cache):
        cache.parent.mkdir()
        cache.write_text("a file in its place")
        Checks(tmp_path / "first").keep(KEY, "sound")
        assert Checks(tmp_path / "first").recall(KEY) == "sound"
        (tmp_path / "checks").write_text("a file in its place")
        Checks(tmp_path).keep(KEY, "sound")
        assert Checks(tmp_path).recall(KEY) is None


class TestWithoutHome:
    """In a container: HOME is not set, and the user is in no passwd."""

    @pytest.fixture(autouse=True)
    def no_home(self, monkeypatch) -> None:
        def unknown(uid: int) -> None:
            raise KeyError(uid)

        monkeypatch.setattr("pwd.getpwuid", unknown)
        for name in ("HOME", "XDG_CACHE_HOME", "TRACKER_CACHE"):
            monkeypatch.setenv(name, "")  # so that monkeypatch removes what is set meanwhile
            monkeypatch.delenv(name)

    @pytest.mark.parametrize("home", [None, "", "relative"])
    def test_the_cache_is_temporary_and_named_once(self, home, monkeypatch, caplog):
        if home is not None:
            monkeypatch.setenv("HOME", home)
        with caplog.at_level(logging.WARNING):
            folder = caching.cache_folder()
        if home == "" and folder == Path("/.cache/tracker"):
            return  # an older platformdirs: a folder like any other, which cannot be written
        assert folder.is_dir()
        assert folder.is_absolute()
        assert caching.cache_folder() == folder
        assert os.environ["TRACKER_CACHE"] == str(folder), "what programs that are started use"
        keep("tasks", KEY, SAID)
        assert recall("tasks", KEY) == SAID
        (record,) = caplog.records
        assert (
            f"there is no home folder, so the temporary folder {folder} is used"
            in record.getMessage()
        )

    def test_the_cache_is_in_the_home_that_is_there(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tmp_path in caching.cache_folder().parents
