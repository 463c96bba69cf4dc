"""What the outcomes of a cell answer, block after block in the random order, and what is next."""

from __future__ import annotations

import numpy as np

from tracker.ablations import INTACT, ablation_of
from tracker.config import CellRequest
from tracker.errors import ExperimentError, WorkError
from tracker.extent import ALL, Extent, shuffled
from tracker.ledger.blocks import BLOCK, Block, places
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC
from tracker.ledger.views import CellIdentity
from tracker.metrics.accuracy import weights_by_task
from tracker.metrics.races import Race
from tracker.questions import Question
from tracker.records import View


def refuse_unbounded(identity: CellIdentity, metric: str) -> None:
    """Raise ExperimentError for a metric whose outcomes are not between 0 and 1."""
    task = identity.benchmark.tasks[0]
    if task.metrics.get(metric) != "mean" or not task.higher_is_better.get(metric, True):
        raise ExperimentError(
            f"'until' needs a metric that is a mean of outcomes between 0 and 1, such as acc; "
            f"{metric} of {identity.benchmark.name} is none. Leave 'until' out, or name another "
            "'metric'"
        )


def race_of(store: CellStore, request: CellRequest) -> CellRace:
    """Run the race that a request with a question asks for; errors as `CellRace`."""
    asked = request.question
    assert asked is not None
    return CellRace(store, store.views.of(request), asked, request.seed)


class CellRace:
    """The race that a cell's outcomes decide; the same one in every process, and after a kill.

    All documents of the benchmark come in one random order, in which each task is in proportion. A
    look follows every block, at the documents before which nothing is missing. Blocks lack only
    those runs that are still open then: what else the ledger holds of later documents counts
    for nothing, because it may be there for a reason.

    Attributes:
        asked: The question.
        runs: Whose means they are.
        race: How it stands, one mean for each run of the view.
        lacking: Which block is to be measured next, and under which ablations; None once the
            question is answered, or all documents have been looked at.
        looked: Documents that were looked at.
        population: Documents that there are.
    """

    def __init__(self, store: CellStore, view: View, asked: Question, seed: int) -> None:
        """Look at what the cell holds already.

        Args:
            store: The cell.
            view: Its metric, and which runs.
            asked: The question.
            seed: Of the random order.

        Raises:
            ExperimentError: The metric has no bounds, or so many runs cannot answer the question.
            WorkError: As `advance`.
        """
        refuse_unbounded(store.identity, view.metric)
        every = store.wanted(ALL)
        self.population = sum(map(len, every.values()))
        self.extent = Extent(sample=max(self.population, 1), seed=seed)
        self.looked = 0
        self.lacking: tuple[Block, tuple[str, ...]] | None = None
        self.asked, self.runs = asked, view.runs
        self._store, self._metric = store, METRIC + view.metric
        self._names = [ablation_of(run, view.removed).name for run in view.runs]
        self._order = shuffled(seed, every)
        there = {task: places(task, documents, seed) for task, documents in every.items()}
        begins: dict[Block, int] = {}
        for position, (task, document) in enumerate(self._order):
            begins.setdefault(Block(task, there[task][document] // BLOCK, seed), position)
        self._blocks = list(begins)
        self._ends = [*begins.values(), self.population][1:]
        self._drops: dict[tuple[str, int], np.ndarray] = {}
        weights = weights_by_task(
            [task for task, _ in self._order], store.identity.benchmark.weight_by_size
        )
        # A drop counts by its document's weight, and the mean of all is the benchmark's drop.
        self._scale = weights * self.population
        most = float(self._scale.max())
        try:
            self.race = Race(asked, self.population, len(self._names), lowest=-most, highest=most)
        except ValueError as error:
            raise ExperimentError(f"'until': {error}") from None
        self.advance()

    def advance(self) -> None:
        """Look at what was measured meanwhile, as far as it goes.

        WorkError where a document has no finite score, or one that is not between 0 and 1.
        """
        while not self.race.standing.answered and self._ends:
            block = self.left[0]
            names = self._needed()
            frame = self._store.read_block(block, self.extent, ["doc", "ablation", self._metric])
            table = frame.pivot(index="doc", columns="ablation", values=self._metric)
            documents = list(self._store.documents(block, self.extent))
            present = set(zip(frame["doc"], frame["ablation"], strict=True))
            if not all((doc, name) in present for doc in documents for name in names):
                self.lacking = block, names
                return
            values = table.reindex(index=documents, columns=[INTACT.name, *self._names])
            outcomes = values.to_numpy(dtype=np.float64)
            self._refuse_unusable(outcomes[:, np.isin(values.columns, names)], block)
            drops = outcomes[:, :1] - outcomes[:, 1:]
            self._drops |= {(block.task, d): row for d, row in zip(documents, drops, strict=True)}
            end = self._ends.pop(0)
            taken = [self._drops.pop(place) for place in self._order[self.looked : end]]
            self.race.look(np.stack(taken) * self._scale[self.looked : end, None])
            self.looked = end
        self.lacking = None

    @property
    def left(self) -> list[Block]:
        """The blocks that were not looked at, in the order in which they come."""
        return self._blocks[len(self._blocks) - len(self._ends) :]

    def _needed(self) -> tuple[str, ...]:
        """Name the baseline and the runs that are open."""
        still = zip(self._names, self.race.standing.open, strict=True)
        return (INTACT.name, *(name for name, is_open in still if is_open))

    def _refuse_unusable(self, outcomes: np.ndarray, block: Block) -> None:
        wrong = ~((outcomes >= 0) & (outcomes <= 1))
        if wrong.any():
            raise WorkError(
                f"'until' cannot be answered: {self._metric.removeprefix(METRIC)} is "
                f"{outcomes[wrong][0]:g} for a document of {block.task}, and not between 0 and 1. "
                "Leave 'until' out"
            )
