"""Real processes: killed in the middle, two at once, a full disk."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import tracker
from tests.runner.elsewhere import outcomes, run, shards, wait_for
from tracker.ledger.blocks import BLOCK
from tracker.measuring.meter import Meter

DOCUMENTS = 3 * BLOCK + 5
LAYERS = 4


@pytest.fixture
def study(tiny_llama, experiment):
    """A study that takes long enough to be interrupted: some blocks of 5 ablations."""

    def study(documents: int) -> Path:
        model = tiny_llama(layers=LAYERS)
        return experiment(model, layer=list(range(LAYERS)), limit=None, sample=documents)

    return study


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    return output


def test_a_killed_run_continues_and_ends_with_the_same_numbers(study, start, tmp_path):
    undisturbed, killed, file = tmp_path / "undisturbed", tmp_path / "killed", study(DOCUMENTS)
    assert not run(file, undisturbed).outcome.failed

    process = start("run", file, "--results", killed, "--track", "none")
    wait_for(lambda: process.poll() is not None or shards(killed))
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
    kept = {path: path.read_bytes() for path in shards(killed)}

    begun: dict[str, tuple[int, str]] = {}
    assert tracker.ls(killed, unfinished=begun) == []
    assert [0 < documents < DOCUMENTS for documents, _ in begun.values()] == [True]
    assert not run(file, killed).outcome.failed
    # What was on disk before is neither lost nor computed again.
    assert all(path.read_bytes() == content for path, content in kept.items())
    pd.testing.assert_frame_equal(outcomes(killed), outcomes(undisturbed), check_exact=True)
    assert not list(killed.glob("cells/*/shards/.*.tmp"))


def test_what_is_stopped_in_a_block_of_very_many_ablations_keeps_its_portions(
    study, tmp_path, monkeypatch
):
    """Was: a map of 465 stretches had nothing to go on from for hours."""
    monkeypatch.setattr("tracker.ledger.blocks.PORTION", 50)
    file, measured = study(BLOCK), []
    honest = Meter.measure

    def stopped(self, task, names, indices, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(list(indices))
        return honest(self, task, names, indices, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(file, tmp_path / "stopped")
    assert [len(each) for each in measured] == [10, 10]
    assert len(outcomes(tmp_path / "stopped")) == 20 * (LAYERS + 1)
    kept = {path: path.read_bytes() for path in shards(tmp_path / "stopped")}
    assert not run(file, tmp_path / "stopped").outcome.failed
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not run(file, tmp_path / "whole").outcome.failed
    found = outcomes(tmp_path / "stopped"), outcomes(tmp_path / "whole")
    pd.testing.assert_frame_equal(*found, check_exact=True)


def test_two_runs_at_once_share_the_work(study, start, tmp_path):
    documents, results = 4 * BLOCK + 5, tmp_path / "shared"
    file = study(documents)
    other = start("run", file, "--results", results)
    wait_for(lambda: shards(results))
    here = run(file, results, track=["mlflow"]).outcome
    assert (here.exit_code, here.models_loaded) == (0, 1), "something was left for this one"
    output = finish(other)
    assert other.returncode == 0, output
    assert "Spearman" in output
    together = pd.concat(pq.read_table(path).to_pandas() for path in shards(results))
    # Counted in the files themselves: nothing was computed twice, nothing is missing.
    assert not together.duplicated(["task", "doc", "ablation"]).any()
    assert len(together) == documents * (LAYERS + 1)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{results / 'mlflow.db'}")
    (project,) = [e for e in client.search_experiments() if e.name == "tracker"]
    runs = client.search_runs([project.experiment_id])
    assert len(runs) == LAYERS + 2


def test_a_full_disk_stops_cleanly_and_the_next_run_continues(study, start, tmp_path):
    file, results = study(BLOCK + 5), tmp_path / "full"

    def no_more_than(size: int):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    arguments = ("run", file, "--results", results, "--track", "none")
    process = start(*arguments, preexec_fn=no_more_than(8_000))
    output = finish(process)
    assert process.returncode == 1, output
    assert "the disk is full" in output
    assert "Traceback" not in output
    assert not shards(results)
    assert not list(results.glob("cells/*/shards/.*"))

    assert not run(file, results).outcome.failed
    assert len(outcomes(results)) == (BLOCK + 5) * (LAYERS + 1)
