"""Texts of documents are published where they are public, and elsewhere only when asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import cli
from tests.helpers.runs import Heard
from tracker import api
from tracker.core.decision_records import PRIVATE
from tracker.ledger.store import Ledger
from tracker.measuring.derive import decisions_of
from tracker.measuring.progress import Silent
from tracker.team.collect import collect
from tracker.team.publish import TEXTS_ASKED, TEXTS_PUBLIC
from tracker.tracking.figures import logged_documents

SECRET = "the merger with the heart company is planned for May"


@pytest.fixture
def study(tiny_llama, experiment, tmp_path) -> Path:
    notes = tmp_path / "notes.txt"
    notes.write_text(f"{SECRET}.\n\nNobody knows of {SECRET}, and it is good so.\n")
    both = ["arc_easy", f"corpus:{notes}"]
    return experiment(tiny_llama(layers=2), limit=24, layer=[0, 1], benchmark=both)


def published(results: Path) -> dict[str, tuple[str, list[str]]]:
    """Benchmark → its documents' table, and the names of its files that hold texts."""
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    found = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        if run.data.tags["tracker.kind"] != "cell":
            continue
        place = Path(run.info.artifact_uri.removeprefix("file://"))
        stated = json.loads((place / "digests/files.json").read_text())
        texts = [name for name in stated if name.startswith("texts--")]
        table = (place / "tables/documents.json").read_text()
        found[run.data.tags["tracker.benchmark"]] = (table, texts)
        assert "tables/documents.json" in run.data.tags["mlflow.loggedArtifacts"]
    return found


def test_what_is_public_is_published_and_what_is_ones_own_when_asked(
    study, results, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    listener = Heard()
    done = api.run(study, results=results, progress=listener)
    assert done.outcome.exit_code == 0
    found = published(results)
    stores = {store.identity.benchmark.name: store for store in Ledger(results).cells()}
    corpus = "corpus:notes.txt"

    # Here, all texts are kept.
    kept = stores["arc_easy"].texts.read()
    assert set(kept) == {("arc_easy", doc) for doc in range(24)}
    assert all(text.public for text in kept.values())
    (first, second) = stores[corpus].texts.read().values()
    assert (first.text.question, first.public) == (f"{SECRET}.", False)
    assert SECRET in second.text.question
    page = (results / "report.html").read_text()
    assert "What breaks" in page

    # There, only the public ones are.
    (asked,) = stores["arc_easy"].views.asked()
    decided = decisions_of(stores["arc_easy"], asked.view)
    table, texts = found["arc_easy"]
    wanted = logged_documents(decided)
    assert table == json.dumps({"columns": wanted.columns, "data": wanted.rows})
    assert wanted.rows
    assert kept["arc_easy", decided.documents[0].doc].text.question.strip() in table.replace(
        "\\n", "\n"
    ).replace('\\"', '"')
    assert texts == [path.name for path in stores["arc_easy"].texts.files()]
    table, texts = found[corpus]
    assert (SECRET in table, texts) == (False, [])
    assert len(json.loads(table)["data"]) == sum(
        len(run.named)
        for run in decisions_of(stores[corpus], stores[corpus].views.asked()[0].view).runs
    )
    assert sum(TEXTS_PUBLIC in line for line in listener.lines) == 1
    assert sum(PRIVATE in line for line in listener.lines) == 1
    everywhere = [p for p in (results / "mlartifacts").rglob("*") if p.is_file()]
    assert everywhere
    assert not any(SECRET.encode() in path.read_bytes() for path in everywhere)

    # A colleague who pulls the project sees what was published.
    source = f"mlflow:sqlite:///{results / 'mlflow.db'}/tracker"
    theirs = collect([source], Silent())
    # Was: what a corpus's shards are called could not be downloaded from MLflow.
    assert theirs.failed == {}
    pulled = {cell.benchmark.name: theirs.decisions()[cell.place] for cell in theirs.cells}
    assert pulled["arc_easy"] == decided
    assert all(one.question is None for one in pulled[corpus].documents)
    assert "not kept here" in pulled[corpus].reasons["texts"]

    # Nor does a published report or what goes with it say more.
    target = f"mlflow:sqlite:///{results / 'mlflow.db'}/reports"
    reported = api.report(results, output=tmp_path / "r.html", publish=[target])
    assert [PRIVATE in note for note in reported.notes] == [True]
    unseen = {p: p.read_bytes() for p in (results / "mlartifacts").rglob("*") if p.is_file()}
    assert sum(p.name == "documents.parquet" for p in unseen) == 1
    assert not any(SECRET.encode() in content for content in unseen.values())

    # Asked, it publishes them too, from what is stored.
    assert published(results) == found
    asked_for = cli("sync", "--publish-documents", "--results", results)
    assert asked_for.exit_code == 0, asked_for.output
    assert TEXTS_ASKED in asked_for.stderr
    table, texts = published(results)[corpus]
    assert SECRET in table
    assert texts == [path.name.replace("%", "=") for path in stores[corpus].texts.files()]
    theirs = collect([source], Silent())
    (own,) = (cell for cell in theirs.cells if cell.benchmark.name == corpus)
    assert SECRET in str(theirs.decisions()[own.place].documents)
    reported = api.report(
        results, output=tmp_path / "r.html", publish=[target], publish_documents=True
    )
    assert reported.notes == ()
