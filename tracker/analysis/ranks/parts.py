"""Ranks a model's heads, experts and stretches passed again by what each of them costs.

Each kind has a board of its own, and what counts is what counts for layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.analysis.claims import (
    Claims,
    answer,
    basis,
    claims,
    controls_answer,
    mean_drop,
    name_benchmarks,
    parts_answer,
    shown_sentence,
    shown_word,
)
from tracker.analysis.comparable import countable
from tracker.analysis.ranks.layers import by_lower_end, mean_relevance, ranked
from tracker.core.changes import Change
from tracker.core.estimates import Estimate
from tracker.core.grouping import grouped
from tracker.core.identities import ModelIdentity
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.support import Verdict, verdicts


@dataclass(frozen=True)
class PartStanding:
    """Where one part of a model stands.

    Attributes:
        run: What is done, as the first of its benchmarks has it.
        relevance: Mean accuracy relevance over the benchmarks.
        deciding: Mean accuracy drop over the benchmarks, a fraction, with the interval that decides
            what is shown: it holds for all parts of the board.
        rank: 1 = matters most, with the best and the worst that it may be; all ranks of a board lie
            between theirs with 95 % confidence. Undefined where the relevance is.
        verdict: What is shown of it, all parts of the board at once.
        shown: The same in a word or two.
    """

    run: RunRecord
    relevance: Estimate
    deciding: Estimate
    rank: Estimate
    verdict: Verdict
    shown: str


@dataclass(frozen=True)
class PartBoard:
    """The parts of one kind of one model that all its benchmarks measured, as layers are listed.

    Attributes:
        kind: What they have in common.
        cells: The cells that count, one a benchmark.
        left_out: Benchmark → why it does not count.
    """

    model: ModelIdentity
    kind: Change
    cells: tuple[CellRecord, ...]
    parts: tuple[PartStanding, ...]
    left_out: dict[str, str]

    @property
    def answer(self) -> str:
        """What is shown of them, in a sentence."""
        order = sorted(self.parts, key=lambda part: -(part.deciding.value or 0.0))
        shown = {part.run.change.label(): part.verdict for part in order}
        over = "on average over" if len(self.cells) > 1 else "on"
        level, many = f"accuracy {over} {name_benchmarks(self.cells)}", self.kind.many
        return f"{shown_sentence(many, shown, level)} ({basis(self.cells, many)})."


def part_boards(cells: Sequence[CellRecord]) -> list[PartBoard]:
    """Rank the parts of one model, kind by kind; none where a kind's benchmarks do not count."""
    kinds = dict.fromkeys(
        run.change.kind.family for cell in cells for run in cell.runs if run.change.kind.many
    )
    boards = [_board(cells, kind) for kind in kinds]
    return [board for board in boards if board.parts]


def model_answer(found: Claims, boards: Sequence[PartBoard], cells: Sequence[CellRecord]) -> str:
    """Say what is shown of a model's layers, if any were removed, and of its parts.

    Parts of which no benchmark counts, as of losses, are spoken of benchmark by benchmark.
    """
    said = [board.answer for board in boards]
    if not found.layers and not said:
        each = ((cell.benchmark.title, parts_answer(cell)) for cell in cells)
        said = [f"{title}: {text}" for title, text in each if text]
    return " ".join([answer(found), *said] if found.layers or not said else said)


def cell_answer(cell: CellRecord) -> str:
    """Return what one benchmark shows by itself; empty where nothing of it counts."""
    layers = claims([cell])
    texts = (answer(layers) if layers.layers else "", parts_answer(cell), controls_answer(cell))
    return " ".join(filter(None, texts))


def _board(cells: Sequence[CellRecord], kind: Change) -> PartBoard:
    def own(cell: CellRecord) -> list[RunRecord]:
        return [run for run in cell.runs if run.change.kind.family == kind]

    counted, left_out = countable([cell for cell in cells if own(cell)], own)
    by_part = grouped((run for cell in counted for run in own(cell)), lambda run: run.change)
    parts = [runs for runs in by_part.values() if len(runs) == len(counted)]
    drops = [mean_drop(runs, len(parts)) for runs in parts]
    full = [runs for runs in parts if all(run.accuracy_relevance is not None for run in runs)]
    places = dict(zip((runs[0].change for runs in full), ranked(counted, full), strict=True))
    standings = []
    for runs, drop, verdict in zip(parts, drops, verdicts(drops), strict=True):
        relevance = mean_relevance(counted, runs)
        standings.append(
            PartStanding(
                run=runs[0],
                relevance=relevance,
                deciding=drop,
                rank=places.get(runs[0].change, Estimate(None, reason=relevance.reason)),
                verdict=verdict,
                shown="undefined" if drop.value is None else shown_word(verdict, drop),
            )
        )
    standings.sort(key=lambda s: (*by_lower_end(s.deciding), s.run.change.order))
    return PartBoard(cells[0].model, kind, tuple(counted), tuple(standings), left_out)
