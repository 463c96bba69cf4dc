"""Servers that lie about a cell's files: nothing lands elsewhere, nothing vast is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.helpers.answering import AnsweringHandler, serve
from tests.helpers.wandb_double import MANIFEST
from tracker.schema.errors import TrackingError
from tracker.tracking import base, open_backend
from tracker.tracking.base import RemoteCell

from .conftest import cell_record

CELL = RemoteCell("key/cell", "the cell", "0" * 64, "abc")


class LyingServer(AnsweringHandler):
    """As much of MLflow's REST as reading a cell takes, with whatever files a test names."""

    files: ClassVar[list[dict[str, Any]]] = []
    content: ClassVar[bytes] = b"{}"

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        if url.path.endswith("/experiments/get-by-name"):
            self._answer_json({"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}})
        elif url.path.endswith("/runs/get"):
            root = f"http://127.0.0.1:{self.server.server_address[1]}/api/2.0/mlflow-artifacts"
            info = {"run_id": "abc", "experiment_id": "1", "artifact_uri": f"{root}/artifacts/abc"}
            self._answer_json({"run": {"info": info, "data": {}}})
        elif url.path.endswith("/artifacts"):
            listed_path = parse_qs(url.query).get("path", [""])[0]
            self._answer_json({"files": self.files if listed_path == "abc" else []})
        elif "/artifacts/abc/" in url.path:
            self.answer(self.content)
        else:
            self.send_error(404)

    def _answer_json(self, content: dict[str, Any]) -> None:
        self.answer(json.dumps(content).encode())


@pytest.fixture
def lying_server(monkeypatch) -> Iterator[str]:
    """Serve the answers that `Lying` holds, and return the address."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serve(LyingServer) as address:
        yield address


def fetch_message(address: str, tmp_path: Path) -> str:
    """Fetch the cell; what was said of it."""
    folder = tmp_path / "within" / "folder"
    folder.mkdir(parents=True)
    backend = open_backend("mlflow", "layers", tmp_path / "results", address)
    with pytest.raises(TrackingError) as caught:
        backend.fetch(CELL, folder)
    backend.close()
    assert not [path for path in tmp_path.rglob("*evil*") if folder not in path.parents]
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["../evil.json", "../../evil.json", "{tmp_path}/evil.json", "..%2Fevil.json", "a/evil"]
)
def test_names_outside_the_folder_are_refused(lying_server, tmp_path, monkeypatch, name):
    name = name.format(tmp_path=tmp_path)
    monkeypatch.setattr(LyingServer, "files", [{"path": name, "is_dir": False, "file_size": 2}])
    message = fetch_message(lying_server, tmp_path)
    assert re.search("invalid file name .*; it is not downloaded|Invalid path", message)


def test_a_vast_file_is_not_downloaded(lying_server, tmp_path, monkeypatch):
    files = [{"path": "cell.json", "is_dir": False, "file_size": 10**10}]
    monkeypatch.setattr(LyingServer, "files", files)
    message = fetch_message(lying_server, tmp_path)
    assert "'cell.json' has 10000000000 bytes" in message
    assert "tracker writes at most 256 MiB per file" in message
    assert not (tmp_path / "within" / "folder" / "cell.json").exists()


def test_a_file_with_too_many_bytes_is_refused(lying_server, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "LARGEST_FILE", 2**20)
    monkeypatch.setattr(LyingServer, "files", [{"path": "x.json", "is_dir": False, "file_size": 2}])
    monkeypatch.setattr(LyingServer, "content", bytes(2**21))
    assert "'x.json' has 2097152 bytes" in fetch_message(lying_server, tmp_path)


MANIFEST_LIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    r"invalid file name '../../evil.json'": lambda file: {"../../evil.json": file},
    "has 10000000000 bytes": lambda file: {"results.json": {**file, "size": 10**10}},
    "'results.json' was not downloaded, because it refers to an external URL": lambda file: {
        "results.json": {**file, "ref": "file:///etc/passwd"}
    },
}
"""What is said of each → what a manifest says of a file that is otherwise as it was sent."""


def test_false_manifests_are_refused(lent, tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"what": "was measured"}')
    folder = tmp_path / "within" / "folder"
    folder.mkdir(parents=True)
    backend = open_backend("wandb", "team/layers", tmp_path / "results")
    backend.publish(cell_record(layers=(0,)), [file], {})
    (cell,) = backend.cells()
    backend.fetch(cell, folder)
    (folder / "results.json").unlink()
    collections = lent.projects["team", "layers"].artifacts.values()
    versions = [version for entry in collections for version in entry.versions]
    (version,) = (v for v in versions if "results.json" in v.manifest["contents"])
    manifest = version.manifest
    for words, lie in MANIFEST_LIES.items():
        false_manifest = {**manifest, "contents": lie(manifest["contents"]["results.json"])}
        version.own_files[MANIFEST] = json.dumps(false_manifest).encode()
        with pytest.raises(TrackingError, match=words):
            backend.fetch(cell, folder)
        assert not list(folder.iterdir())
    backend.close()
    assert not list(tmp_path.rglob("*evil*"))
