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
from tests.helpers.runs import list_shards, read_outcomes, run_experiment, wait_for, write_arc
from tests.helpers.trace_tasks import write_paired_tasks
from tracker.benchmarks.generation import TextGenerator
from tracker.ledger.blocks import BLOCK_SIZE
from tracker.ledger.cache import Drafts, cache_folder, note_path
from tracker.measuring.meter import Meter
from tracker.schema.answers import statement

DOCUMENTS = 3 * BLOCK_SIZE + 5
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
    assert not run_experiment(file, undisturbed).outcome.failed

    process = forked("run", file, "--results", killed, "--track", "none")
    wait_for(lambda: process.is_over() or list_shards(killed))
    process.send_signal(signal.SIGKILL)
    assert process.finish()[1] == -signal.SIGKILL, "it finished before it could be killed"
    contents = {path: path.read_bytes() for path in list_shards(killed)}

    unfinished: dict[str, tuple[int, str]] = {}
    assert tracker.ls(killed, unfinished=unfinished) == []
    assert [0 < documents < DOCUMENTS for documents, _ in unfinished.values()] == [True]
    assert not run_experiment(file, killed).outcome.failed
    # What was on disk before is neither lost nor computed again.
    assert all(path.read_bytes() == content for path, content in contents.items())
    pd.testing.assert_frame_equal(
        read_outcomes(killed), read_outcomes(undisturbed), check_exact=True
    )
    assert not list(killed.glob("cells/*/shards/.*.tmp"))


@pytest.mark.parametrize("benchmark", ["sampled", "traces:sampled"])
def test_a_run_killed_between_texts_continues_with_them(
    benchmark, tiny_llama, experiment, forked, spy, tmp_path
):
    settings = {"include_path": str(write_paired_tasks(tmp_path / "tasks")), "data": None}
    file = experiment(tiny_llama(), benchmark=benchmark, layer=[1], limit=None, **settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    keys = spy(Drafts, "keep", lambda _, key, texts: key)
    written = spy(TextGenerator, "generate_texts", lambda _, prompt, *others: prompt)
    assert not run_experiment(file, whole).outcome.failed
    drafts = [note_path(cache_folder(), "drafts", key) for key in keys]
    n_written, written[:] = len(written), []
    assert not any(path.exists() for path in drafts)

    process = forked("run", file, "--results", killed, "--track", "none")
    wait_for(lambda: process.is_over() or drafts[1].exists())
    process.send_signal(signal.SIGKILL)
    assert process.finish()[1] == -signal.SIGKILL, "it finished before it could be killed"
    assert not list_shards(killed)
    n_kept = sum(path.exists() for path in drafts)
    assert 1 < n_kept < len(drafts)
    assert not run_experiment(file, killed).outcome.failed
    assert len(written) == n_written - n_kept
    pd.testing.assert_frame_equal(read_outcomes(killed), read_outcomes(whole), check_exact=True)
    assert not any(path.exists() for path in drafts)


def test_what_is_stopped_in_a_block_of_very_many_ablations_keeps_its_portions(
    study, tmp_path, monkeypatch
):
    """Was: a map of 465 stretches had nothing to go on from for hours."""
    monkeypatch.setattr("tracker.ledger.blocks.MAX_OUTCOMES", 50)
    file, portions = study(BLOCK_SIZE), []
    original = Meter.measure

    def stop(self, task, names, indices, *rest):
        if len(portions) == 2:
            raise KeyboardInterrupt
        portions.append(list(indices))
        return original(self, task, names, indices, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(file, tmp_path / "stopped")
    assert [len(indices) for indices in portions] == [10, 10]
    assert len(read_outcomes(tmp_path / "stopped")) == 20 * (LAYERS + 1)
    contents = {path: path.read_bytes() for path in list_shards(tmp_path / "stopped")}
    assert not run_experiment(file, tmp_path / "stopped").outcome.failed
    assert all(path.read_bytes() == content for path, content in contents.items())
    assert not run_experiment(file, tmp_path / "whole").outcome.failed
    frames = read_outcomes(tmp_path / "stopped"), read_outcomes(tmp_path / "whole")
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_two_runs_at_once_share_the_work(study, forked, tmp_path):
    documents, results = 4 * BLOCK_SIZE + 5, tmp_path / "shared"
    file = study(documents)
    process = forked("run", file, "--results", results)
    wait_for(lambda: list_shards(results))
    outcome = run_experiment(file, results, track=["mlflow"]).outcome
    assert (outcome.exit_code, outcome.models_loaded) == (0, 1), "something was left for this one"
    output, code = process.finish()
    assert code == 0, output
    assert "Spearman" in output
    rows = pd.concat(pq.read_table(path).to_pandas() for path in list_shards(results))
    # Counted in the files themselves: nothing was computed twice, nothing is missing.
    assert not rows.duplicated(["task", "doc", "ablation"]).any()
    assert len(rows) == documents * (LAYERS + 1)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{results / 'mlflow.db'}")
    (project,) = [e for e in client.search_experiments() if e.name == "tracker"]
    runs = client.search_runs([project.experiment_id])
    assert len(runs) == LAYERS + 2


def test_a_full_disk_stops_cleanly_and_the_next_run_continues(study, forked, tmp_path):
    file, results = study(BLOCK_SIZE + 5), tmp_path / "full"

    arguments = ("run", file, "--results", results, "--track", "none")
    output, code = forked(*arguments, largest=8_000).finish()
    assert code == 1, output
    assert "the disk is full" in output
    assert "Traceback" not in output
    assert not list_shards(results)
    assert not list(results.glob("cells/*/shards/.*"))

    assert not run_experiment(file, results).outcome.failed
    assert len(read_outcomes(results)) == (BLOCK_SIZE + 5) * (LAYERS + 1)


def test_a_killed_run_and_two_at_once_give_one_answer(tiny_llama, experiment, forked, tmp_path):
    model = tiny_llama(seed=3, layers=6, hidden_size=128, intermediate_size=256)
    data = str(write_arc(tmp_path / "data", 400))
    file = experiment(model, layer=list(range(6)), data=data, limit=None, until="top 2 within 9 pp")
    (alone,) = run_experiment(file, tmp_path / "alone").cells
    assert alone.answer.looked > 64

    results = tmp_path / "results"
    killed = forked("run", file, "--results", results, "--track", "none")
    wait_for(lambda: killed.is_over() or list_shards(results))
    killed.send_signal(signal.SIGKILL)
    assert killed.finish()[1] == -signal.SIGKILL, "it finished before it could be killed"

    other = forked("run", file, "--results", results, "--track", "none")
    (cell,) = run_experiment(file, results).cells
    output, code = other.finish()
    assert code == 0, output
    assert (cell.answer, cell.runs) == (alone.answer, alone.runs)
    assert f" {statement(alone.answer)}" in output
    # Nothing was measured twice, and nothing but what the question needs.
    rows = sum(pq.read_metadata(path).num_rows for path in list_shards(results))
    assert rows == alone.answer.looked + sum(run.n for run in alone.answer.runs)


@pytest.fixture
def ended(long, tmp_path):
    """End a program in the middle of what its worker does: the worker ends too."""
    long.write_text(long.read_text().replace("limit: {value: 165}", "limit: {value: 320}"))

    def end(process, ending: signal.Signals) -> None:
        wait_for(lambda: list_shards(tmp_path / "results"))
        (worker,) = psutil.Process(process.pid).children()
        process.send_signal(ending)
        psutil.wait_procs([worker], timeout=60)
        assert not worker.is_running()

    return end


def test_ctrl_c_ends_the_worker_too(long, ended, forked, tmp_path):
    options = ("--results", tmp_path / "results", "--track", "none", "--workers", "1")
    process = forked("run", long, *options)
    ended(process, signal.SIGINT)
    output, code = process.finish()
    assert code == 130, output


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
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    assert output.splitlines().count("begins") == 1
