"""Test what only Trackio has: local files, and settings that would send runs elsewhere."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tracker import api
from tracker.schema.errors import RequestError, TrackingError
from tracker.tracking import open_backend, target
from tracker.tracking.trackio import service

from .conftest import cell_record


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio"


def test_trackio_publishes_and_reports(folder, tmp_path, study):
    results = tmp_path / "results"
    outcome = api.run(study, results=results, track=["trackio:lab/layers"]).outcome
    assert (outcome.exit_code, dict(outcome.unpublished)) == (0, {})
    command = f"TRACKIO_DIR={folder} trackio show --project lablayers"
    assert list(outcome.locations.items()) == [("trackio:lab/layers", command)]
    (published,) = api.sync(results=results).places["trackio:lab/layers"]
    assert (published.created, published.updated, published.unchanged) == (0, 0, 4)
    report = api.report("trackio:lab/layers", output=tmp_path / "page.html")
    assert (report.outcome.failed, list(report.cells)) == ({}, api.ls(results))
    with pytest.raises(
        RequestError, match="Trackio does not support reports; use one of: mlflow, wandb"
    ):
        api.leaderboard(results, publish="trackio:lab/layers")


def test_trackio_contacts_no_server(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as hub, monkeypatch.context() as patch:
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        for name, value in {
            "HF_ENDPOINT": address,
            "HF_TOKEN": "hf_planted",
            "HF_HUB_OFFLINE": "0",
            "TRACKIO_SPACE_ID": "ann/space",
            "TRACKIO_SERVER_URL": f"{address}/?write_token=planted",
        }.items():
            patch.setenv(name, value)
        with closing(open_backend("trackio", "layers", tmp_path)) as backend:
            published = backend.publish(cell_record(layers=(0,)), [], {})
        assert published.created == 3
        (note,) = published.notes
        assert note.startswith("tracker ignores TRACKIO_SPACE_ID, TRACKIO_SERVER_URL")
        hub.settimeout(0)
        with pytest.raises(BlockingIOError):
            hub.accept()


def test_append_only_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")
    with closing(open_backend("trackio", "layers", tmp_path)) as backend:
        with pytest.raises(TrackingError, match="set TRACKIO_DIR to a local folder"):
            backend.publish(cell_record(), [], {})
        with pytest.raises(TrackingError, match=r"could not be read.*'layers' does not exist"):
            backend.cells()


def test_a_missing_extra_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match=r"Trackio is not installed; type: .*\[trackio\]"):
        target("trackio")
    with pytest.raises(TrackingError, match="Trackio is not installed"):
        open_backend("trackio", "layers", tmp_path)


# Was: one run of another program, whose configuration has a word there, and nothing was published.
def test_runs_of_other_programs_stay_unchanged(tmp_path):
    other_program = """
import trackio
for theirs in ("mine", {"version": 1}, None):
    trackio.init("layers", config={"tracker": theirs}, embed=False)
    trackio.log({"loss": 1})
    trackio.finish()
"""
    subprocess.run([sys.executable, "-c", other_program], check=True)
    with closing(open_backend("trackio", "layers", tmp_path)) as backend:
        assert backend.publish(cell_record(layers=(0,)), [], {}).created == 3
        assert backend.publish(cell_record(layers=(0,)), [], {}).unchanged == 3
        assert len(backend.cells()) == 1
