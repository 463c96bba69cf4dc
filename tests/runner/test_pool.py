"""Workers that share cells: what cannot be made to happen on purpose, with workers in threads."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tests.helpers.runs import RecordingProgress, list_shards, run_experiment, write_arc
from tracker.benchmarks.benchmark import open_benchmark
from tracker.ledger.blocks import BLOCK_SIZE, Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring import worker as workers
from tracker.measuring.derive import derive_record
from tracker.measuring.executors.pool import MAX_DEATHS, WorkerPool
from tracker.measuring.fill import AHEAD_RATIO
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.prepare import find_cell
from tracker.measuring.worker import DeviceLostError, Worker
from tracker.schema.experiment_input import load_experiment
from tracker.schema.extent import random_order
from tracker.schema.remote import ProcessEndedError, Remote

DOCUMENTS = BLOCK_SIZE + 8

pytestmark = pytest.mark.usefixtures("one_thread")


class ThreadWorker(Remote):
    """A worker in this process; `before` is called before each of its methods, and may raise."""

    def __init__(self, name: str, hook: Callable[..., None]) -> None:
        super().__init__(name)
        self.closed = 0
        self._hook = hook
        self._worker = Worker(Options())

    def _call(self, method: str, *arguments: Any) -> Any:
        self._hook(method, *arguments)
        return None if method == "ready" else getattr(self._worker, method)(*arguments)

    def close(self) -> None:
        self.closed += 1
        self._worker = Worker(Options())


class SharedCells:
    """Some cells, and what was heard of them."""

    def __init__(self, file: Path, results: Path) -> None:
        self.ledger, self.heard = Ledger(results), RecordingProgress()
        self.requests = load_experiment(file).file.cells()
        self.started: list[str] = []
        self.outcomes: dict[str, CellStore | Exception] = {}

    def measure(self, *hooks: Callable[..., None]) -> int:
        """Measure the cells with as many workers; how many models they loaded."""
        jobs = [Job((find_cell(r, self.ledger),), open_benchmark(r)) for r in self.requests]
        reporting = Reporting(self.ledger, self.heard, self.begin, self.end)
        threads = [ThreadWorker(f"worker {n}", hook) for n, hook in enumerate(hooks, 1)]
        pool = WorkerPool(threads, jobs, reporting, Checks(self.ledger.root))
        n_loaded = pool.run("workers")
        assert all(worker.closed for worker in threads)
        return n_loaded

    def begin(self, cell, store) -> None:
        assert str(cell.request.benchmark) not in self.outcomes, "it has ended"
        assert store.folder.is_dir()
        self.started.append(str(cell.request.benchmark))

    def end(self, cell, outcome) -> None:
        assert str(cell.request.benchmark) not in self.outcomes, "told twice"
        self.outcomes[str(cell.request.benchmark)] = outcome

    def store(self, benchmark: str = "arc_easy") -> CellStore:
        outcome = self.outcomes[benchmark]
        assert isinstance(outcome, CellStore), outcome
        return outcome


def record_call(calls: list[tuple[Any, ...]], *call: Any) -> None:
    """Remember a call of a worker."""
    calls.append(call)


@pytest.fixture
def shared(tiny_llama, experiment, tmp_path):
    data, model = write_arc(tmp_path / "data", DOCUMENTS), tiny_llama()

    def make(*benchmarks: str, **settings: object) -> SharedCells:
        settings = {"data": str(data), **settings}
        file = experiment(model, benchmark=list(benchmarks or ["arc_easy"]), **settings)
        return SharedCells(file, tmp_path / "results")

    return make


def test_a_sample_is_measured_once_by_all_together(shared):
    cells, barrier, calls = shared(limit=None, sample=BLOCK_SIZE + 2), Barrier(2), []

    def wait_for_both(method, *arguments) -> None:
        if method == "measure":
            calls.append(arguments)
            barrier.wait(300)  # the second block is measured beside the first one

    assert cells.measure(wait_for_both, wait_for_both) == 2
    assert cells.started == ["arc_easy"]
    assert len(calls) == 2
    assert cells.heard.n_counted == cells.heard.n_expected == (BLOCK_SIZE + 2) * 3 * 5
    frame = cells.store().read()
    order = random_order(1234, "arc_easy", range(DOCUMENTS))
    assert set(frame["doc"]) == set(order[: BLOCK_SIZE + 2])
    assert not frame.duplicated(["task", "doc", "ablation"]).any()
    # Both loaded the model, and both checked it: what is said of it is said once.
    assert len(cells.heard.lines) == len(set(cells.heard.lines))


@pytest.mark.parametrize("error", [ProcessEndedError, DeviceLostError])
def test_documents_that_kill_their_threadsfail_their_cell_alone(shared, error):
    cells, deaths, benchmarks = shared("arc_easy", "arc_challenge"), [], []

    def kill_worker(method, *arguments) -> None:
        if method == "open":
            benchmarks.append(str(arguments[0][0].benchmark))
        if method == "measure" and benchmarks[-1] == "arc_easy" and len(arguments[2]) < BLOCK_SIZE:
            deaths.append(arguments)
            raise error("out of memory")

    assert cells.measure(kill_worker) == 1 + MAX_DEATHS
    assert len(deaths) == MAX_DEATHS
    assert str(cells.outcomes["arc_easy"]) == (
        f"{MAX_DEATHS} workers died while measuring one block of documents of arc_easy; reason "
        "of the last death: out of memory"
    )
    assert "worker 1 died; its unfinished work is done again (out of memory)" in cells.heard.lines
    assert len(cells.store("arc_challenge").read()) == DOCUMENTS * 5
    # The other block was measured, and is kept.
    _, store = cells.ledger.cells()
    assert len(store.read()) == BLOCK_SIZE * 5


def test_a_block_that_another_command_is_at_is_left_to_it(shared):
    first_cells = shared(limit=BLOCK_SIZE)
    first_cells.measure(partial(record_call, []))
    cells = shared("arc_easy", "arc_challenge", limit=None)
    # A file, which may be closed twice: a number might be another file's by then.
    lock_file = Path(first_cells.store().lock(Block("arc_easy", 1)).lock_file).open("ab")  # noqa: SIM115  closed by `release`
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    benchmarks = []

    def release(method, *arguments) -> None:
        if method == "open":
            benchmarks.append(str(arguments[0][0].benchmark))
        if method == "measure" and len(benchmarks) == 2:
            lock_file.close()

    assert cells.measure(release) == 1
    # While the rest of the first one is held, the second is measured.
    assert benchmarks == ["arc_easy", "arc_challenge", "arc_easy"]
    assert cells.heard.lines.count("another process is measuring 1 block of documents") == 1
    assert len(cells.store().read()) == DOCUMENTS * 5
    assert cells.heard.n_counted == cells.heard.n_expected


def test_threadsthat_see_other_weights_are_refused(shared, monkeypatch):
    cells, numbers = shared(), count()

    def change_identity(worker: Worker, *arguments):
        facts = original(worker, *arguments)
        identity = facts.model.model_copy(update={"fingerprint": str(next(numbers))})
        return replace(facts, model=identity)

    original = Worker.open
    monkeypatch.setattr(Worker, "open", change_identity)
    barrier = Barrier(2)
    cells.measure(*[lambda method, *_: barrier.wait(300) if method == "open" else None] * 2)
    assert "read different versions of the model" in str(cells.outcomes["arc_easy"])


def test_nobody_is_left(shared):
    cells = shared("arc_easy", "arc_challenge")
    calls = []

    def fail_worker(method, *_) -> None:
        if method == "ready":
            calls.append(method)
            if len(calls) > 1:
                raise ProcessEndedError("the cluster is gone")
        if method == "measure":
            raise ProcessEndedError("killed")

    cells.measure(fail_worker)
    assert "worker 1 cannot start: the cluster is gone" in cells.heard.lines
    messages = {str(end) for end in cells.outcomes.values()}
    assert messages == {"no worker is left: the cluster is gone"}


def test_a_lost_device_is_named_by_its_first_line(shared, monkeypatch):
    def lose_device(*_: object) -> None:
        raise RuntimeError("CUDA error: launch failure\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(workers, "open_model", lose_device)
    with pytest.raises(DeviceLostError, match=r"^CUDA error: launch failure$"):
        Worker(Options()).open(shared().requests)


def test_one_worker_measures_what_is_needed_and_two_a_quarter_more(
    tiny_llama, experiment, tmp_path
):
    """A question of which each block depends on those before it."""
    settings = {"data": str(write_arc(tmp_path / "data", 400)), "limit": None}
    question = experiment(tiny_llama(seed=3), until="drop within 4 pp at 80 %", **settings)
    (plain_cell,) = run_experiment(question, tmp_path / "alone").cells
    assert plain_cell.is_stopped
    n_needed = len(list_shards(tmp_path / "alone"))
    assert n_needed > AHEAD_RATIO
    for number in (1, 2):
        calls: list[tuple[Any, ...]] = []
        cells = SharedCells(question, tmp_path / str(number))
        cells.measure(*[partial(record_call, calls)] * number)
        n_measured = [method for method, *_ in calls].count("measure")
        # A block ahead of its turn is measured only by a worker that would wait otherwise.
        n_ahead = n_needed / AHEAD_RATIO if number > 1 else 0
        assert n_needed <= n_measured <= n_needed + n_ahead
        assert cells.heard.n_counted == cells.heard.n_expected
        store = cells.store()
        cell = derive_record(store, store.views.view_of(*cells.requests))
        assert (cell.answer, cell.runs) == (plain_cell.answer, plain_cell.runs)
