"""What a study is: which cells it needs, and what it says of them once they are measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.experiment import Experiment
from tracker.core.findings import FindingRecord, FoundChart
from tracker.core.records import WHOLE_LAYER, CellRecord, Kind, Place
from tracker.core.tables import Table
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.progress import Progress
from tracker.runner import Finished
from tracker.team.publish import Publisher

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
SIGNIFICANT = 0.05
"""An adjusted p-value below this is called significant."""
FEWEST = 3
"""Layers that an order of layers needs."""


@dataclass(frozen=True)
class StudyContext:
    """What a study was asked.

    Attributes:
        file: The experiment file.
        experiment: What it says.
        ledger: The results folder.
        options: How models run, and where.
        progress: Told what happens.
        publisher: Hands runs to the tracking backends.
    """

    file: Path
    experiment: Experiment
    ledger: Ledger
    options: Options
    progress: Progress
    publisher: Publisher


@dataclass(frozen=True)
class Subject:
    """One measured cell of a study: its request, and where its outcomes are.

    Attributes:
        request: What was asked for.
        store: Its place in the ledger.
        record: All that its outcomes say.
    """

    request: CellRequest
    store: CellStore
    record: CellRecord

    def outcomes(self) -> pd.DataFrame:
        """Read the outcomes: one row a (task, doc, ablation), as `CellStore.read_documents`."""
        return self.store.read_documents(self.request.extent)


def whole_layers(request: CellRequest) -> tuple[int, ...]:
    """List the layers that a request removes alone and as a whole, ascending."""
    kind = WHOLE_LAYER
    if request.only is not None:
        asked = [(layer, Kind(part, span, done)) for part, span, layer, done in request.only]
        return tuple(sorted(layer for layer, of in asked if of == kind))
    asked_for = (
        kind.component in request.components
        and kind.span in request.spans
        and kind.intervention in request.interventions
    )
    return tuple(sorted(request.layers)) if asked_for else ()


def removing_whole_layers(request: CellRequest, **update: Any) -> CellRequest:
    """Ask for whole single layers of a cell and nothing else, with other fields as in `update`."""
    alone: dict[str, Any] = {
        "components": (WHOLE_LAYER.component,),
        "spans": (WHOLE_LAYER.span,),
        "interventions": (WHOLE_LAYER.intervention,),
        "only": None,
    }
    return request.model_copy(update=alone | update)


def refuse_removed(cell: CellRequest, why: str, asked: StudyContext) -> None:
    """Refuse a cell of which layers are removed beneath: RequestError."""
    if cell.removed:
        raise RequestError(f"{cell.title}: {why}; leave 'removed' out of {asked.file}")


def grouped(each: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Put together what has the same key, in order."""
    groups: dict[Hashable, list[T]] = {}
    for one in each:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


@dataclass(frozen=True)
class StudyResult:
    """What a study says; see `FindingRecord`.

    Beside it stand what became of cells that it ran itself, and places of them on which it rests.
    """

    answers: Sequence[str]
    tables: Sequence[Table] = ()
    charts: Sequence[FoundChart] = ()
    lacking: Sequence[str] = ()
    assumptions: Sequence[str] = ()
    ran: Finished = field(default_factory=Finished)
    rests_on: Sequence[Place] = ()

    def recorded(self, study: Study, asked: StudyContext, on: Sequence[Subject]) -> FindingRecord:
        """Make the record that is kept and shown, of a study over some cells."""
        return FindingRecord(
            study=study.name,
            experiment=asked.file.name,
            question=study.question,
            answers=tuple(self.answers),
            tables=tuple(self.tables),
            charts=tuple(self.charts),
            lacking=tuple(self.lacking),
            assumptions=tuple(self.assumptions),
            rests_on=tuple(
                dict.fromkeys([*(subject.record.place for subject in on), *self.rests_on])
            ),
        )


@dataclass(frozen=True)
class StudySetting:
    """What one study alone can be told, on the command line and as an argument of its class.

    Attributes:
        name: The argument's name.
        kind: Of which type it is.
        help: What it means, in a sentence.
        default: What holds where it is not said.
        repeated: Whether it may be given again; the argument is a sequence then.
        least: The smallest number that is allowed; None where the study says it itself.
        most: The largest one.
        flag: How it is typed, where that is not its name.
    """

    name: str
    kind: type[int] | type[float] | type[str] | type[Path]
    help: str
    default: int | float | None = None
    repeated: bool = False
    least: int | None = None
    most: int | None = None
    flag: str = ""


class Study(Protocol):
    """One question. A folder of this package has one, and `registry` names it.

    It keeps nothing from one call to the next: each may be asked alone.

    Attributes:
        name: What it is called on the command line.
        question: What it asks, as a sentence that heads its section.
        about: What `--help` says below what it asks: how it goes about it, and examples.
        settings: What it alone can be told.
    """

    name: str
    question: str
    about: str
    settings: tuple[StudySetting, ...]

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """List the cells that it needs measured, equal models next to each other.

        RequestError where the experiment file is not enough for the question.
        """
        ...

    def prepare(self, asked: StudyContext) -> None:
        """Make what its cells are about and is not there: a model that is built, for most nothing.

        RequestError where that cannot be made.
        """

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer from the cells that could be measured, in the order of the requests.

        What else it must observe of a model it measures here, block by block, and keeps in the
        ledger. What is not there is said under `lacking`.
        """
        ...
