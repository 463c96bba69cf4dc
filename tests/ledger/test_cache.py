"""A machine's cache is trusted only where nobody else can have written it."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tracker.ledger import cache as caching
from tracker.ledger.cache import Checks, keep, note_path, own_folder, recall

KEY = "0123456789abcdef" * 4
SAID = {"what": "was found"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Point to a user cache that does not exist yet, as in a fresh process."""
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "home" / "cache"))
    caching._say.cache_clear()
    caching._for_this_process.cache_clear()
    return tmp_path / "home" / "cache"


@pytest.fixture
def give_away(monkeypatch) -> Callable[[Path], None]:
    """Make a file another user's: really, or for whoever is not root, all of them."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 4321, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 4321)

    return give


def test_what_is_kept_is_recalled_and_nobody_else_comes_to_it(cache):
    before = os.umask(0o002)
    try:
        keep("tasks", KEY, SAID)
        assert recall("tasks", KEY) == SAID
        assert recall("tasks", "f" * 64) == {}
        for folder in (cache, cache.parent, cache / "tasks"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        # A user's own, made by hand.
        cache.chmod(0o755)
        (cache / "tasks").chmod(0o755)
        note_path(cache, "tasks", KEY).chmod(0o644)
        assert recall("tasks", KEY) == SAID
    finally:
        os.umask(before)


def place(cache: Path, what: str) -> Path:
    note = note_path(cache, "tasks", KEY)
    return {"the cache": cache, "a folder of it": note.parent, "the note": note}[what]


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("what", ["the cache", "a folder of it", "the note"])
def test_what_others_may_write_is_not_used_and_that_is_said_once(cache, what, mode, caplog):
    """Was: whatever stood there was believed."""
    keep("tasks", KEY, SAID)
    for folder in (cache, cache / "tasks"):
        folder.chmod(0o755)
    note = note_path(cache, "tasks", KEY)
    place(cache, what).chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert recall("tasks", KEY) == recall("tasks", KEY) == {}
    (said,) = caplog.messages
    assert f"chmod -R go-w {cache}" in said
    if what == "the note":  # it is written anew, in a folder that is the user's alone
        keep("tasks", KEY, SAID)
        assert recall("tasks", KEY) == SAID
    else:
        before = note.read_bytes()
        keep("tasks", KEY, {"what": "else"})
        assert note.read_bytes() == before


@pytest.mark.parametrize("what", ["the cache", "a folder of it", "the note"])
def test_what_is_another_users_is_not_used(cache, what, give_away):
    keep("tasks", KEY, SAID)
    give_away(place(cache, what))
    assert recall("tasks", KEY) == {}


def test_a_link_inside_leads_nowhere_and_the_cache_may_be_one(cache, tmp_path):
    keep("tasks", KEY, SAID)
    (cache / "tasks").rename(tmp_path / "elsewhere")
    (cache / "tasks").symlink_to(tmp_path / "elsewhere")
    assert recall("tasks", KEY) == {}
    (cache / "tasks").unlink()
    (tmp_path / "elsewhere").rename(cache / "tasks")
    cache.rename(tmp_path / "scratch")
    cache.symlink_to(tmp_path / "scratch")
    assert recall("tasks", KEY) == SAID


def test_what_is_exact_is_not_believed_from_a_folder_that_others_write(tmp_path, cache):
    """Was: one user's verdict, or a planted one, decided for all who share a results folder."""
    shared, checks = tmp_path / "shared", Checks(tmp_path / "shared")
    checks.keep(KEY, "sound")
    for place in (shared, shared / "checks"):
        place.chmod(0o2775)
    assert Checks(shared).recall(KEY) == "sound"  # this user's own cache has it
    note_path(cache, "checks", KEY).unlink()
    assert Checks(shared).recall(KEY) is None
    checks.keep(KEY, "unsound")
    assert Checks(shared).recall(KEY) == "unsound"


def test_a_folder_of_the_cache_is_taken_where_all_of_it_is_the_users(cache, give_away):
    folder = own_folder("project")
    assert folder == cache / "project"
    (folder / "cells").mkdir()
    (folder / "cells" / "shard").write_text("")
    assert own_folder("project") == folder
    give_away(folder / "cells" / "shard")
    other = own_folder("project")
    assert other != folder
    assert not list(other.iterdir())
    assert own_folder("project") == other  # for the time of a process


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
        assert f"there is no home folder; {folder} is used" in record.getMessage()

    def test_the_cache_is_in_the_home_that_is_there(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tmp_path in caching.cache_folder().parents
