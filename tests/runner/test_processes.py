"""Real processes: killed in the middle, two at once, a full disk."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

import tracker
from tests.helpers.runs import arc, outcomes, run, shards, wait_for
from tracker.core.answers import statement
from tracker.ledger.blocks import BLOCK
from tracker.measuring.meter import Meter

DOCUMENTS = 3 * BLOCK + 5
LAYERS = 4


@pytest.fixture
def study(tiny_llama, experiment):
    """Build a study that takes long enough to be interrupted: some blocks of 5 ablations."""

    def study(documents: int) -> Path:
        model = tiny_llama(layers=LAYERS)
        return experiment(model, layer=list(range(LAYERS)), limit=None, sample=documents)

    return study


def test_a_killed_run_continues_and_ends_with_the_same_numbers(study, forked, tmp_path):
    undisturbed, killed, file = tmp_path / "undisturbed", tmp_path / "killed", study(DOCUMENTS)
    assert not run(file, undisturbed).outcome.failed

    process = forked("run", file, "--results", killed, "--track", "none")
    wait_for(lambda: process.is_over() or shards(killed))
    process.send_signal(signal.SIGKILL)
    assert process.end()[1] == -signal.SIGKILL, "it finished before it could be killed"
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


def test_two_runs_at_once_share_the_work(study, forked, tmp_path):
    documents, results = 4 * BLOCK + 5, tmp_path / "shared"
    file = study(documents)
    other = forked("run", file, "--results", results)
    wait_for(lambda: shards(results))
    here = run(file, results, track=["mlflow"]).outcome
    assert (here.exit_code, here.models_loaded) == (0, 1), "something was left for this one"
    output, code = other.end()
    assert code == 0, output
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


def test_a_full_disk_stops_cleanly_and_the_next_run_continues(study, forked, tmp_path):
    file, results = study(BLOCK + 5), tmp_path / "full"

    arguments = ("run", file, "--results", results, "--track", "none")
    output, code = forked(*arguments, largest=8_000).end()
    assert code == 1, output
    assert "the disk is full" in output
    assert "Traceback" not in output
    assert not shards(results)
    assert not list(results.glob("cells/*/shards/.*"))

    assert not run(file, results).outcome.failed
    assert len(outcomes(results)) == (BLOCK + 5) * (LAYERS + 1)


def test_a_killed_run_and_two_at_once_give_one_answer(tiny_llama, experiment, forked, tmp_path):
    model = tiny_llama(seed=3, layers=6, hidden_size=128, intermediate_size=256)
    data = str(arc(tmp_path / "data", 400))
    file = experiment(model, layer=list(range(6)), data=data, limit=None, until="top 2 within 9 pp")
    (alone,) = run(file, tmp_path / "alone").cells
    assert alone.answer.looked > 64

    results = tmp_path / "results"
    killed = forked("run", file, "--results", results, "--track", "none")
    wait_for(lambda: killed.is_over() or shards(results))
    killed.send_signal(signal.SIGKILL)
    assert killed.end()[1] == -signal.SIGKILL, "it finished before it could be killed"

    other = forked("run", file, "--results", results, "--track", "none")
    (cell,) = run(file, results).cells
    output, code = other.end()
    assert code == 0, output
    assert (cell.answer, cell.runs) == (alone.answer, alone.runs)
    assert f" {statement(alone.answer)}" in output
    # Nothing was measured twice, and nothing but what the question needs.
    rows = sum(pq.read_metadata(path).num_rows for path in shards(results))
    assert rows == alone.answer.looked + sum(run.n for run in alone.answer.runs)


@pytest.fixture
def ended(long, tmp_path):
    """End a program in the middle of what its worker does: the worker ends too."""
    long.write_text(long.read_text().replace("limit: {value: 165}", "limit: {value: 320}"))

    def end(process, how: signal.Signals) -> None:
        wait_for(lambda: shards(tmp_path / "results"))
        (worker,) = psutil.Process(process.pid).children()
        process.send_signal(how)
        psutil.wait_procs([worker], timeout=60)
        assert not worker.is_running()

    return end


def test_ctrl_c_ends_the_worker_too(long, ended, forked, tmp_path):
    told = ("--results", tmp_path / "results", "--track", "none", "--workers", "1")
    process = forked("run", long, *told)
    ended(process, signal.SIGINT)
    said, code = process.end()
    assert code == 130, said


def test_a_users_script_is_not_run_again_and_leaves_no_worker_when_it_is_killed(
    long, ended, start, tmp_path
):
    """`multiprocessing` would, in each worker, where no `if __name__` stands before it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import tracker\nprint('begins', flush=True)\n"
        f"tracker.run({str(long)!r}, results={str(tmp_path / 'results')!r}, track='none', "
        "workers=1)\n"
    )
    process = start(script, program=sys.executable, cwd=tmp_path)
    ended(process, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    assert said.splitlines().count("begins") == 1
