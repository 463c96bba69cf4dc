"""Publishing beside the measurement: it stops neither the next cell nor the night."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tracker import api
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Silent
from tracker.team import publish as publishing
from tracker.team.publish import Publisher


class Listener(Silent):
    """Knows when the second cell is being measured."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.said: list[str] = []
        self._began = 0
        self._then = then

    def say(self, message: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.said.append(message)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        self._began += 1
        if self._began == 2:
            self._then()


@pytest.fixture
def study(tiny_llama, experiment) -> Path:
    both = ["copa", "winogrande"]
    return experiment(tiny_llama(layers=2), limit=4, layer=[0, 1], benchmark=both)


# Was: the next cell waited for the upload, and a chart that failed ended the run.
def test_the_next_cell_is_measured_meanwhile_and_what_breaks_is_unpublished(
    study, results, monkeypatch
):
    measuring = threading.Event()
    charts = publishing.cell_charts

    def broken(cell):
        if cell.benchmark.name == "winogrande":
            return charts(cell)
        assert measuring.wait(60), "the second cell waited for the first to be published"
        raise ValueError("no such colour")

    listener = Listener(measuring.set)
    monkeypatch.setattr(publishing, "cell_charts", broken)
    done = api.run(study, results=results, progress=listener)
    assert [cell.benchmark.name for cell in done.cells] == ["copa", "winogrande"]
    assert not done.outcome.failed
    assert done.outcome.exit_code == 1
    ((title, why),) = done.outcome.unpublished.items()
    assert "copa" in title
    assert "ValueError: no such colour" in why
    assert f"tracker sync --to mlflow --results {results}" in why
    assert any("measured but not published" in line for line in listener.said)
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    (place,) = [e.experiment_id for e in client.search_experiments() if e.name == "tracker"]
    assert len(client.search_runs([place])) == 4

    # Nor does a receipt that cannot be read.
    monkeypatch.setattr(publishing, "cell_charts", charts)
    (store,) = (s for s in Ledger(results).cells() if s.identity.benchmark.name == "copa")
    shutil.rmtree(store.folder / "receipts")
    (store.folder / "receipts").write_text("in the way")
    ((_, why),) = api.run(study, results=results).outcome.unpublished.items()
    assert "receipts" in why
    assert "tracker sync" in why
    (store.folder / "receipts").unlink()
    assert not api.sync(results=results).failed
    assert len(client.search_runs([place])) == 8


def test_an_interrupt_does_not_wait_for_an_upload(study, results, monkeypatch):
    released, drawn = threading.Event(), threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def charts(_: object) -> dict[str, object]:
        released.wait(60)
        drawn.set()
        return {}

    monkeypatch.setattr(publishing, "cell_charts", charts)
    with pytest.raises(KeyboardInterrupt):
        api.run(study, results=results, progress=Listener(interrupt))
    assert not drawn.is_set(), "Was: the upload was waited for, and the test could not see it."
    released.set()

    # In a W&B trial it is done before anything else is.
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    threads = []
    monkeypatch.setattr(publishing, "cell_charts", lambda _: threads.append(threading.get_ident()))
    (record, *_) = api.ls(results)
    (store,) = (each for each in Ledger(results).cells() if each.identity.key == record.key)
    begun = Publisher(["mlflow"], "other", results).begin(store, record)
    assert begun.done()
    # The thread that the interrupt left behind may still draw charts of its own.
    assert threading.get_ident() in threads


def test_how_runs_are_shown_is_said_where_they_are_shown(study, results):
    """Was: also without any backend."""
    for track, times in (([], 0), (["mlflow"], 2)):
        heard = Listener(lambda: None)
        api.run(study, results=results, track=track, runs="cells", progress=heard)
        said = [line for line in heard.said if "one with their table" in line]
        assert len(said) == times, heard.said


@pytest.mark.parametrize("track", [("mlflow", "wandb:team/a"), ("wandb:team/a", "wandb:team/b")])
def test_every_backend_shows_what_is_measured(track, tmp_path, monkeypatch):
    """Was: W&B's run was left out where another was shown before it, as if a trial showed it."""
    opened: list[str] = []
    monkeypatch.setattr(
        "tracker.team.publish.open_live_run", lambda name, *place: opened.append(name)
    )
    Publisher(track, "layers", tmp_path)
    assert opened == [text.partition(":")[0] for text in track]
