"""Does pruning by measured accuracy beat pruning by proxies, and what does it cost?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.search.beforehand import refuse_unsavable
from tracker.search.cells import Lender
from tracker.search.conduct import pursue
from tracker.search.report import COST
from tracker.search.request import SearchRequest, calibration_of, search_of
from tracker.search.search import budget_of, refuse_mixed, refuse_unknown
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    removing_whole_layers,
    whole_layers,
)
from tracker.studies.prune.figures import ACCURACY, COSINES, compared
from tracker.studies.prune.layout import charts_of, tables_of
from tracker.studies.prune.sentences import answers_of

AMOUNTS = ("25 %", "50 %")
STRATEGIES = (
    *(ACCURACY, "gold_logprob", "taylor", "perplexity"),
    *("cosine_oneshot", "relative_update", "last", "random"),
)
ELSEWHERE = (ACCURACY, *COSINES)
"""Strategies that are calibrated on other documents than the benchmark's own too."""
_ASSUMED = (
    "What chose and what tests are different documents. Calibrated on all tasks: as many documents "
    "of each benchmark of the file as of one; each benchmark's loss counts alike.",
    "Accuracy: Wilson's interval. Differences of two prunings on one benchmark: paired documents "
    "(Bonett and Price 2012); means over benchmarks, whose documents differ, by the method of "
    "variance estimates recovery (Donner and Zou 2012). Intervals say what other test documents "
    "would give; the benchmarks, the calibration documents and what these chose are held fixed.",
    "Tests: sign flips of the documents' differences, as if each were as likely to be x as −x; "
    f"called significant where p, adjusted by Holm (1979), is below {100 * SIGNIFICANT:.0f} %, and "
    "the interval that holds for all comparisons at once (Bonferroni) is on one side of 0. A "
    "strategy leaves the most where it is so beside every other one but random, which is never "
    "called best.",
    "A strategy that draws at random counts, document by document, by the mean of its draws.",
    f"{COST} Every candidate is scored again after each removal.",
)


class Prune(Study):
    """Prunes by each strategy, on each benchmark of a file, by several calibrations.

    `remove` are the amounts, `strategy` the strategies, `text` a file of plain text to calibrate
    on, `test_sample` how many test documents of each task (None = as many as choose).
    """

    question = "Does pruning by measured accuracy beat pruning by proxies, and what does it cost?"

    def __init__(
        self,
        remove: Sequence[str] = (),
        strategy: Sequence[str] = (),
        text: Path | None = None,
        test_sample: int | None = None,
    ) -> None:
        self._said_amounts = tuple(remove)
        self._amounts = self._said_amounts or AMOUNTS
        self._strategies = tuple(dict.fromkeys(strategy or STRATEGIES))
        self._text = None if text is None else f"corpus:{text}"
        self._test_sample = test_sample

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for each layer's removal on the calibration documents, a greedy search's first step.

        RequestError where the file removes layers besides, or its settings are no search's.
        """
        requests = []
        lender = Lender(asked.ledger, asked.options, asked.progress)
        for cell in asked.experiment.cells():
            layers = whole_layers(cell)
            if cell.removed or not layers:
                raise RequestError(
                    f"{cell.title}: what can go is searched from the intact model, over whole "
                    "layers; leave 'removed', 'component', 'span' and 'intervention' out"
                )
            if cell.limit is not None:
                raise RequestError(
                    f"{cell.title}: calibration documents are drawn at random; write 'sample: "
                    f"{{value: {cell.limit}}}' instead of 'limit'"
                )
            wanted = calibration_of(removing_whole_layers(cell, layers=layers))
            searches = self._searches(wanted, [wanted])
            # Wrong settings are said before anything is measured.
            refuse_unknown(searches, asked.options.trust_remote_code)
            budgets = {one.remove: budget_of(one, lender) for one in searches}
            within = [budgets[one.remove] for one in searches]
            refuse_unsavable(searches, within, asked.options.trust_remote_code)
            requests.append(wanted)
        searches = [s for cell in requests for s in self._searches(cell, requests)]
        refuse_mixed(searches, lender, {})
        return requests

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Search, test what was chosen, and set the strategies beside each other."""
        lacking = [
            f"{one.record.title}: its metric is a loss, which has no mean with accuracies"
            for one in subjects
            if not one.record.higher_is_better
        ]
        cells = [one.request for one in subjects if one.record.higher_is_better]
        if not cells:
            return StudyResult((), ["No benchmark of the file has an accuracy."], lacking=lacking)
        searches = [search for cell in cells for search in self._searches(cell, cells)]
        lender = Lender(asked.ledger, asked.options, asked.progress, self._typed(asked.asked.typed))
        pursued = pursue(searches, lender, asked.publisher)
        result = StudyResult(
            _ASSUMED,
            lacking=lacking,
            ran=pursued.outcome,
            rests_on=[place for record in pursued.records for place in record.rests_on],
        )
        for group in compared(pursued, self._text):
            result.answers += answers_of(group)
            result.tables += tables_of(group)
            result.charts += charts_of(group)
        if ACCURACY not in self._strategies:
            lacking.append("differences to pruning by accuracy; add --strategy accuracy")
        elif self._text is None:
            lacking.append(
                "calibration on plain text; give a .txt file, documents between blank lines, or a "
                ".jsonl file: --text FILE"
            )
        return result

    def _typed(self, asked: Sequence[str]) -> list[str]:
        """Write the command for what was `asked`, with what this study alone was told."""
        if not asked:
            return []
        typed = [("--remove", amount) for amount in self._said_amounts]
        if self._strategies != STRATEGIES:
            typed += [("--strategy", name) for name in self._strategies]
        if self._text is not None:
            typed.append(("--text", self._text.removeprefix("corpus:")))
        if self._test_sample is not None:
            typed.append(("--test-sample", str(self._test_sample)))
        return ["tracker", "study", self.name, *asked, *itertools.chain(*typed)]

    def _searches(self, cell: CellRequest, cells: Sequence[CellRequest]) -> list[SearchRequest]:
        """List the searches for one benchmark, of a file with these cells."""
        alone = cell.model_copy(update={"part": None, "sample": None, "layers": (), "only": None})
        same = [
            one for one in cells if one.model_copy(update={"benchmark": cell.benchmark}) == cell
        ]
        tasks = tuple(dict.fromkeys(one.benchmark for one in same))
        elsewhere = [tasks] if len(tasks) > 1 else []
        elsewhere += [(self._text,)] if self._text is not None else []
        ways: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in self._strategies]
        ways += itertools.product([s for s in self._strategies if s in ELSEWHERE], elsewhere)
        samples = {"sample": cell.sample, "test_sample": self._test_sample or cell.sample}
        return [
            search_of(alone, {"strategy": name, "remove": amount, "calibrate": by, **samples})
            for amount, (name, by) in itertools.product(self._amounts, ways)
        ]
