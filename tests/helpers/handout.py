"""A handout of blocks with a worker in this process."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.runs import Heard
from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.experiment_input import load_experiment
from tracker.executors.handout import Cell, Handout, Task
from tracker.executors.worker import Worker
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.prepare import look_up


class Desk:
    """A handout, a worker in this process, and what was heard of both."""

    def __init__(self, file: Path, results: Path) -> None:
        ledger = Ledger(results)
        requests = load_experiment(file).file.cells()
        jobs = [Job((look_up(each, ledger),), open_benchmark(each)) for each in requests]
        self.results = results
        self.heard = Heard()
        self.began: list[str] = []
        self.ends: dict[str, CellStore | Exception] = {}
        self.handout = Handout(jobs, Reporting(ledger, self.heard, self.begin, self.end))
        self.worker = Worker(Options(), str(Path.cwd()), {}, checks=Checks(results))
        self.opened: Cell | None = None

    def begin(self, asked, store) -> None:
        assert asked.request.benchmark not in self.ends, "it has ended"
        assert store.folder.is_dir()
        self.began.append(asked.request.benchmark)

    def end(self, asked, outcome) -> None:
        assert asked.request.benchmark not in self.ends, "told twice"
        self.ends[asked.request.benchmark] = outcome

    def next(self) -> Task | None:
        return self.handout.next(self.opened, [])

    def do(self, task: Task) -> None:
        self.opened = task.cell
        if task.block is None:
            self.handout.opened(task, *self.worker.open(task.cell.job.requests))
        else:
            asked = task.block.task, task.missing, task.whole
            self.handout.measured(task, *self.worker.measure(*asked))

    def finish(self) -> None:
        while task := self.next():
            self.do(task)
