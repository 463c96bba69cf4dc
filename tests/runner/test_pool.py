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

from tests.helpers.runs import Heard, arc, run, shards
from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.experiment_input import load_experiment
from tracker.core.extent import random_order
from tracker.core.remote import ProcessEndedError, Remote
from tracker.executors.pool import ATTEMPTS, WorkerPool
from tracker.ledger.blocks import BLOCK, Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring import worker as workers
from tracker.measuring.derive import record_of
from tracker.measuring.fill import AHEAD
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.prepare import look_up
from tracker.measuring.worker import DeviceLostError, Worker

DOCUMENTS = BLOCK + 8

pytestmark = pytest.mark.usefixtures("one_thread")


class Threaded(Remote):
    """A worker in this process; `before` is called before each of its methods, and may raise."""

    def __init__(self, name: str, before: Callable[..., None]) -> None:
        super().__init__(name)
        self.closed = 0
        self._before = before
        self._worker = Worker(Options())

    def _call(self, method: str, *arguments: Any) -> Any:
        self._before(method, *arguments)
        return None if method == "ready" else getattr(self._worker, method)(*arguments)

    def close(self) -> None:
        self.closed += 1
        self._worker = Worker(Options())


class Cells:
    """Some cells, and what was heard of them."""

    def __init__(self, file: Path, results: Path) -> None:
        self.ledger, self.heard = Ledger(results), Heard()
        self.requests = load_experiment(file).file.cells()
        self.began: list[str] = []
        self.ends: dict[str, CellStore | Exception] = {}

    def measure(self, *befores: Callable[..., None]) -> int:
        """Measure the cells with as many workers; how many models they loaded."""
        jobs = [Job((look_up(r, self.ledger),), open_benchmark(r)) for r in self.requests]
        to = Reporting(self.ledger, self.heard, self.begin, self.end)
        threaded = [Threaded(f"worker {n}", before) for n, before in enumerate(befores, 1)]
        loaded = WorkerPool(threaded, jobs, to, Checks(self.ledger.root)).run("workers")
        assert all(worker.closed for worker in threaded)
        return loaded

    def begin(self, cell, store) -> None:
        assert str(cell.request.benchmark) not in self.ends, "it has ended"
        assert store.folder.is_dir()
        self.began.append(str(cell.request.benchmark))

    def end(self, cell, outcome) -> None:
        assert str(cell.request.benchmark) not in self.ends, "told twice"
        self.ends[str(cell.request.benchmark)] = outcome

    def store(self, benchmark: str = "arc_easy") -> CellStore:
        outcome = self.ends[benchmark]
        assert isinstance(outcome, CellStore), outcome
        return outcome


def note(calls: list[tuple[Any, ...]], *call: Any) -> None:
    """Remember a call of a worker."""
    calls.append(call)


@pytest.fixture
def shared(tiny_llama, experiment, tmp_path):
    data, model = arc(tmp_path / "data", DOCUMENTS), tiny_llama()

    def make(*benchmarks: str, **settings: object) -> Cells:
        settings = {"data": str(data), **settings}
        file = experiment(model, benchmark=list(benchmarks or ["arc_easy"]), **settings)
        return Cells(file, tmp_path / "results")

    return make


def test_a_sample_is_measured_once_by_all_together(shared):
    cells, barrier, measured = shared(limit=None, sample=BLOCK + 2), Barrier(2), []

    def together(method, *arguments) -> None:
        if method == "measure":
            measured.append(arguments)
            barrier.wait(300)  # the second block is measured beside the first one

    assert cells.measure(together, together) == 2
    assert cells.began == ["arc_easy"]
    assert len(measured) == 2
    assert cells.heard.counted == cells.heard.expected == (BLOCK + 2) * 3 * 5
    frame = cells.store().read()
    order = random_order(1234, "arc_easy", range(DOCUMENTS))
    assert set(frame["doc"]) == set(order[: BLOCK + 2])
    assert not frame.duplicated(["task", "doc", "ablation"]).any()
    # Both loaded the model, and both checked it: what is said of it is said once.
    assert len(cells.heard.lines) == len(set(cells.heard.lines))


@pytest.mark.parametrize("error", [ProcessEndedError, DeviceLostError])
def test_documents_that_kill_their_workers_fail_their_cell_alone(shared, error):
    cells, deaths, opened = shared("arc_easy", "arc_challenge"), [], []

    def dies(method, *arguments) -> None:
        if method == "open":
            opened.append(str(arguments[0][0].benchmark))
        if method == "measure" and opened[-1] == "arc_easy" and len(arguments[2]) < BLOCK:
            deaths.append(arguments)
            raise error("out of memory")

    assert cells.measure(dies) == 1 + ATTEMPTS
    assert len(deaths) == ATTEMPTS
    assert str(cells.ends["arc_easy"]) == (
        f"{ATTEMPTS} workers died over the same documents of arc_easy; the last: out of memory"
    )
    assert "worker 1 died; what it did is done again (out of memory)" in cells.heard.lines
    assert len(cells.store("arc_challenge").read()) == DOCUMENTS * 5
    # The other block was measured, and is kept.
    _, easy = cells.ledger.cells()
    assert len(easy.read()) == BLOCK * 5


def test_a_block_that_another_command_is_at_is_left_to_it(shared):
    first = shared(limit=BLOCK)
    first.measure(partial(note, []))
    cells = shared("arc_easy", "arc_challenge", limit=None)
    # A file, which may be closed twice: a number might be another file's by then.
    held = Path(first.store().lock(Block("arc_easy", 1)).lock_file).open("ab")  # noqa: SIM115  closed by `release`
    fcntl.flock(held, fcntl.LOCK_EX)
    opened = []

    def release(method, *arguments) -> None:
        if method == "open":
            opened.append(str(arguments[0][0].benchmark))
        if method == "measure" and len(opened) == 2:
            held.close()

    assert cells.measure(release) == 1
    # While the rest of the first one is held, the second is measured.
    assert opened == ["arc_easy", "arc_challenge", "arc_easy"]
    assert cells.heard.lines.count("1 block is being measured by another process") == 1
    assert len(cells.store().read()) == DOCUMENTS * 5
    assert cells.heard.counted == cells.heard.expected


def test_workers_that_see_other_weights_are_refused(shared, monkeypatch):
    cells, numbers = shared(), count()

    def other(worker: Worker, *arguments):
        facts = honest(worker, *arguments)
        identity = facts.model.model_copy(update={"fingerprint": str(next(numbers))})
        return replace(facts, model=identity)

    honest = Worker.open
    monkeypatch.setattr(Worker, "open", other)
    both = Barrier(2)
    cells.measure(*[lambda method, *_: both.wait(300) if method == "open" else None] * 2)
    assert "do not all see the same model" in str(cells.ends["arc_easy"])


def test_nobody_is_left(shared):
    cells = shared("arc_easy", "arc_challenge")
    starts = []

    def gone(method, *_) -> None:
        if method == "ready":
            starts.append(method)
            if len(starts) > 1:
                raise ProcessEndedError("the cluster is gone")
        if method == "measure":
            raise ProcessEndedError("killed")

    cells.measure(gone)
    assert "worker 1 cannot start: the cluster is gone" in cells.heard.lines
    ends = {str(end) for end in cells.ends.values()}
    assert ends == {"no worker is left: the cluster is gone"}


def test_a_lost_device_is_named_by_its_first_line(shared, monkeypatch):
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: launch failure\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(workers, "open_model", lost)
    with pytest.raises(DeviceLostError, match=r"^CUDA error: launch failure$"):
        Worker(Options()).open(shared().requests)


def test_one_worker_measures_what_is_needed_and_two_a_quarter_more(
    tiny_llama, experiment, tmp_path
):
    """A question of which each block depends on those before it."""
    settings = {"data": str(arc(tmp_path / "data", 400)), "limit": None}
    question = experiment(tiny_llama(seed=3), until="drop within 4 pp at 80 %", **settings)
    (alone,) = run(question, tmp_path / "alone").cells
    assert alone.is_stopped
    needed = len(shards(tmp_path / "alone"))
    assert needed > AHEAD
    for number in (1, 2):
        calls: list[tuple[Any, ...]] = []
        cells = Cells(question, tmp_path / str(number))
        cells.measure(*[partial(note, calls)] * number)
        measured = [method for method, *_ in calls].count("measure")
        # A block ahead of its turn is measured only by a worker that would wait otherwise.
        assert needed <= measured <= (needed if number == 1 else needed * (1 + 1 / AHEAD))
        assert cells.heard.counted == cells.heard.expected
        store = cells.store()
        cell = record_of(store, store.views.of(*cells.requests))
        assert (cell.answer, cell.runs) == (alone.answer, alone.runs)
