"""Texts of documents are published where they are public, and elsewhere only when asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import cli
from tests.helpers.runs import RecordingProgress
from tracker import api
from tracker.ledger.store import Ledger
from tracker.measuring.derive import read_decisions
from tracker.measuring.progress import Silent
from tracker.schema.records import PRIVATE_TEXTS
from tracker.team.collect import collect_cells
from tracker.team.publish import PUBLIC_TEXTS_NOTE, REQUESTED_TEXTS_NOTE
from tracker.tracking.figures import logged_documents

SECRET = "the merger with the heart company is planned for May"


@pytest.fixture
def study(tiny_llama, experiment, tmp_path) -> Path:
    notes = tmp_path / "notes.txt"
    notes.write_text(f"{SECRET}.\n\nNobody knows of {SECRET}, and it is good so.\n")
    benchmark_names = ["arc_easy", f"corpus:{notes}"]
    return experiment(tiny_llama(layers=2), limit=24, layer=[0, 1], benchmark=benchmark_names)


def published_texts(results: Path) -> dict[str, tuple[str, list[str]]]:
    """Benchmark → its documents' table, and the names of its files that hold texts."""
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    texts_by_benchmark = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        if run.data.tags["tracker.kind"] != "cell":
            continue
        run_folder = Path(run.info.artifact_uri.removeprefix("file://"))
        digests = json.loads((run_folder / "digests/files.json").read_text())
        texts = [name for name in digests if name.startswith("texts--")]
        table = (run_folder / "tables/documents.json").read_text()
        texts_by_benchmark[run.data.tags["tracker.benchmark"]] = (table, texts)
        assert "tables/documents.json" in run.data.tags["mlflow.loggedArtifacts"]
    return texts_by_benchmark


def test_only_public_texts_are_published(study, results, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    listener = RecordingProgress()
    run_results = api.run(study, results=results, progress=listener)
    assert run_results.outcome.exit_code == 0
    published_before = published_texts(results)
    stores = {store.identity.benchmark.name: store for store in Ledger(results).cells()}
    corpus = "corpus:notes.txt"

    # Here, all texts are kept.
    stored_texts = stores["arc_easy"].texts.read()
    assert set(stored_texts) == {("arc_easy", doc) for doc in range(24)}
    assert all(text.public for text in stored_texts.values())
    (first_text, second_text) = stores[corpus].texts.read().values()
    assert (first_text.text.question, first_text.public) == (f"{SECRET}.", False)
    assert SECRET in second_text.text.question
    page = (results / "report.html").read_text()
    assert "What breaks" in page

    # There, only the public ones are.
    (asked_view,) = stores["arc_easy"].views.read_requested()
    decisions = read_decisions(stores["arc_easy"], asked_view.view)
    table, texts = published_before["arc_easy"]
    expected_table = logged_documents(decisions)
    assert table == json.dumps({"columns": expected_table.columns, "data": expected_table.rows})
    assert expected_table.rows
    question = stored_texts["arc_easy", decisions.documents[0].doc].text.question.strip()
    assert question in table.replace("\\n", "\n").replace('\\"', '"')
    assert texts == [path.name for path in stores["arc_easy"].texts.files()]
    table, texts = published_before[corpus]
    assert (SECRET in table, texts) == (False, [])
    assert len(json.loads(table)["data"]) == sum(
        len(run.named)
        for run in read_decisions(
            stores[corpus], stores[corpus].views.read_requested()[0].view
        ).runs
    )
    assert sum(PUBLIC_TEXTS_NOTE in line for line in listener.lines) == 1
    assert sum(PRIVATE_TEXTS in line for line in listener.lines) == 1
    artifact_files = [p for p in (results / "mlartifacts").rglob("*") if p.is_file()]
    assert artifact_files
    assert not any(SECRET.encode() in path.read_bytes() for path in artifact_files)

    # A colleague who pulls the project sees what was published.
    source = f"mlflow:sqlite:///{results / 'mlflow.db'}/tracker"
    collected = collect_cells([source], Silent())
    # Was: what a corpus's shards are called could not be downloaded from MLflow.
    assert collected.failed == {}
    derived = collected.derive_decisions()
    pulled = {cell.benchmark.name: derived[cell.record_key] for cell in collected.cells}
    assert pulled["arc_easy"] == decisions
    assert all(document.question is None for document in pulled[corpus].documents)
    assert "not stored" in pulled[corpus].reasons["texts"]

    # Nor does a published report or what goes with it say more.
    target = f"mlflow:sqlite:///{results / 'mlflow.db'}/reports"
    reported = api.report(results, output=tmp_path / "r.html", publish=[target])
    assert [PRIVATE_TEXTS in note for note in reported.notes] == [True]
    contents = {p: p.read_bytes() for p in (results / "mlartifacts").rglob("*") if p.is_file()}
    assert sum(p.name == "documents.parquet" for p in contents) == 1
    assert not any(SECRET.encode() in content for content in contents.values())

    # Asked, it publishes them too, from what is stored.
    assert published_texts(results) == published_before
    sync_result = cli("sync", "--publish-documents", "--results", results)
    assert sync_result.exit_code == 0, sync_result.output
    assert REQUESTED_TEXTS_NOTE in sync_result.stderr
    table, texts = published_texts(results)[corpus]
    assert SECRET in table
    assert texts == [path.name.replace("%", "=") for path in stores[corpus].texts.files()]
    collected = collect_cells([source], Silent())
    (own_cell,) = (cell for cell in collected.cells if cell.benchmark.name == corpus)
    assert SECRET in str(collected.derive_decisions()[own_cell.record_key].documents)
    page = tmp_path / "r.html"
    reported = api.report(results, output=page, publish=[target], publish_documents=True)
    assert reported.notes == ()
