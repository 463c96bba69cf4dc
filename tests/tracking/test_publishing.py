"""Publishing beside the measurement: it stops neither the next cell nor the night."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tracker import api, tracking
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Silent
from tracker.team import publish as publishing
from tracker.team.publish import Publisher


class Listener(Silent):
    """Knows when the second cell is being measured."""

    def __init__(self, on_second: Callable[[], None]) -> None:
        self.messages: list[str] = []
        self._n_started = 0
        self._on_second = on_second

    def say(self, message: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.messages.append(message)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        self._n_started += 1
        if self._n_started == 2:
            self._on_second()


@pytest.fixture
def study(tiny_llama, experiment) -> Path:
    benchmark_names = ["copa", "winogrande"]
    return experiment(tiny_llama(layers=2), limit=4, layer=[0, 1], benchmark=benchmark_names)


# Was: the next cell waited for the upload, and a chart that failed ended the run.
def test_publishing_does_not_delay_measuring(study, results, monkeypatch):
    measuring = threading.Event()
    original = publishing.cell_charts

    def fail_charts(cell):
        if cell.benchmark.name == "winogrande":
            return original(cell)
        assert measuring.wait(60), "the second cell waited for the first to be published"
        raise ValueError("no such colour")

    listener = Listener(measuring.set)
    monkeypatch.setattr(publishing, "cell_charts", fail_charts)
    run_results = api.run(study, results=results, progress=listener)
    assert [cell.benchmark.name for cell in run_results.cells] == ["copa", "winogrande"]
    assert not run_results.outcome.failed
    assert run_results.outcome.exit_code == 1
    ((title, reason),) = run_results.outcome.unpublished.items()
    assert "copa" in title
    assert "ValueError: no such colour" in reason
    assert f"tracker sync --to mlflow --results {results}" in reason
    assert any("measured but not published" in line for line in listener.messages)
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    (experiment_id,) = [e.experiment_id for e in client.search_experiments() if e.name == "tracker"]
    assert len(client.search_runs([experiment_id])) == 4

    # Nor does a receipt that cannot be read.
    monkeypatch.setattr(publishing, "cell_charts", original)
    (store,) = (s for s in Ledger(results).cells() if s.identity.benchmark.name == "copa")
    shutil.rmtree(store.folder / "receipts")
    (store.folder / "receipts").write_text("in the way")
    ((_, reason),) = api.run(study, results=results).outcome.unpublished.items()
    assert "receipts" in reason
    assert "tracker sync" in reason
    (store.folder / "receipts").unlink()
    assert not api.sync(results=results).failed
    assert len(client.search_runs([experiment_id])) == 8


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
    (store,) = (s for s in Ledger(results).cells() if s.identity.key == record.key)
    future = Publisher(["mlflow"], "other", results).begin(store, record)
    assert future.done()
    # The thread that the interrupt left behind may still draw charts of its own.
    assert threading.get_ident() in threads


def test_the_run_selection_is_reported(study, results):
    """Was: also without any backend."""
    for track, times in (([], 0), (["mlflow"], 2)):
        listener = Listener(lambda: None)
        api.run(study, results=results, track=track, runs="cells", progress=listener)
        lines = [line for line in listener.messages if "in a table; for separate runs" in line]
        assert len(lines) == times, listener.messages


@pytest.mark.parametrize("track", [("mlflow", "wandb:team/a"), ("wandb:team/a", "wandb:team/b")])
def test_every_backend_shows_what_is_measured(track, tmp_path, monkeypatch):
    """Was: W&B's run was left out where another was shown before it, as if a trial showed it."""
    opened: list[str] = []
    monkeypatch.setattr(tracking, "open_live_run", lambda name, *_: opened.append(name))
    Publisher(track, "layers", tmp_path)
    assert opened == [text.partition(":")[0] for text in track]
