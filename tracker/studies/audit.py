"""The audit: every proxy of a layer's relevance against the accuracy that its removal costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy import stats

from tracker.config import CellRequest
from tracker.errors import RequestError
from tracker.findings import (
    Entry,
    FoundChart,
    FoundTable,
    Heading,
    Line,
    LineChart,
    MapChart,
    Unit,
)
from tracker.metrics.across import BLOCK, Paired
from tracker.metrics.multiple import holm
from tracker.metrics.orders import midranks
from tracker.metrics.resampling import bias_corrected_interval
from tracker.records import WHOLE_LAYER, Kind
from tracker.reporting.formats import counted, points, two_digits
from tracker.reporting.formats import p_value as written_p
from tracker.reporting.wording import benchmark_labels, model_labels
from tracker.studies.audited import (
    FEWEST,
    MAJOR,
    RELIABLE,
    TOP,
    ModelAudit,
    Summary,
    alike,
    means,
    overlaps,
    pooled,
)
from tracker.studies.auditing import DROP, NAMES, audited, passes
from tracker.studies.base import Asked, Said, Subject

LEVEL = 0.05
PAPER = (0.15, 0.46)
"""The paper's coefficients over inner layers and benchmarks, without their minus: y is the accuracy
after removal."""
PAPER_DIFFER, PAPER_MAJORLY = 0.938, 0.536
_ONE_BENCHMARK = "needs two benchmarks of this model above chance"


class Audit:
    """Sets every proxy beside the accuracy drop, per model and benchmark, with what each costs."""

    name = "audit"
    question = (
        "Which proxy of a layer's relevance tells what removing the layer costs, and which is "
        "worth its compute?"
    )

    def requests(self, asked: Asked) -> list[CellRequest]:
        """List the cells of the file, each with its whole single layers of the intact model."""
        cells: dict[CellRequest, None] = {}
        for cell in asked.experiment.cells():
            only = cell.only and tuple(
                run for run in cell.only if Kind(run[0], run[1], run[3]) == WHOLE_LAYER
            )
            change: dict[str, Any] = {
                "components": (WHOLE_LAYER.component,),
                "spans": (WHOLE_LAYER.span,),
                "interventions": (WHOLE_LAYER.intervention,),
                "removed": (),
                "only": only,
            }
            # A cap on the runs may leave none of these.
            if only != ():
                cells[cell.model_copy(update=change)] = None
        if not any(len(cell.layers) >= FEWEST for cell in cells):
            raise RequestError(
                "the audit orders layers, and this file names fewer than three; write e.g. layer: "
                "{min: 0, max: 29}"
            )
        return list(cells)

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
        """Compare, model by model."""
        by_model: dict[str, list[Subject]] = {}
        for subject in subjects:
            by_model.setdefault(subject.record.model.model_dump_json(), []).append(subject)
        names = model_labels([mine[0].record.model for mine in by_model.values()])
        answers: list[str] = []
        tables: list[FoundTable] = []
        charts: list[FoundChart] = []
        lacking: list[str] = []
        for name, mine in zip(names, by_model.values(), strict=True):
            labels = benchmark_labels([subject.record for subject in mine])
            said = _OfModel(name, audited(asked, mine, labels))
            answers += said.answers()
            tables += said.tables()
            charts += said.charts()
            lacking += said.lacking()
        return Said(answers, tables, charts, lacking, _ASSUMPTIONS)


class _OfModel(ModelAudit):
    """What is said of one model."""

    # Answers

    def answers(self) -> list[str]:
        """Sentences, contradictions of the paper first."""
        if not self.summaries:
            return [f"{self.name}: no proxy can be set beside a drop; the tables say why."]
        said = [*self._pooled(), *self._differ(), *self._task(), self._best(), *self._worth()]
        ordered = sorted(said, key=lambda each: not each[0])
        return [f"{self.name}: {sentence}" for _, sentence in ordered]

    @property
    def _on(self) -> str:
        documents = sum(cell.record.n for cell in self.cells)
        return f"{counted(len(self.cells), 'benchmark')}, {counted(documents, 'document')}"

    def _pooled(self) -> list[tuple[bool, str]]:
        """The paper's own figure: cosine over inner layers × benchmarks."""
        summary = next((s for s in self.summaries if s.proxy == "cosine_score"), None)
        if summary is None:
            return []
        found = pooled(summary.cells)
        if found is None:
            return []
        value, low, high = found
        if low > PAPER[1]:
            verdict = f"more than in any of the paper's models (at most {PAPER[1]})"
        elif high < PAPER[0]:
            verdict = f"less than in any of the paper's models (at least {PAPER[0]})"
        else:
            verdict = f"which reaches the paper's {PAPER[0]} to {PAPER[1]}"
        against = low > PAPER[1] or high < PAPER[0]
        start = "against the paper, " if against else ""
        return [
            (
                against,
                f"{start}over inner layers × benchmarks the cosine score and the accuracy drop "
                f"correlate at r = {two_digits(value)} ({two_digits(low)} to {two_digits(high)}), "
                f"{verdict}. Benchmark by benchmark, all layers, Spearman is "
                f"{_with_interval(summary)} on average ({self._on}; Holm's p over all proxies "
                f"{written_p(self.adjusted['cosine_score'])}).",
            )
        ]

    def _differ(self) -> list[tuple[bool, str]]:
        if "cosine_score" not in self.orders:
            return []
        exact, major = self.orders["cosine_score"]
        return [
            (
                False,
                f"cosine score and accuracy drop rank {points(exact.share)} % of layers apart, "
                f"where random orders rank {points(exact.chance)} % apart (the paper: "
                f"{points(PAPER_DIFFER)} %, without a chance level), and "
                f"{points(major.share)} % by more than a quarter of the layers, where random "
                f"orders do {points(major.chance)} % (p = {written_p(major.smooth_p)} of agreeing "
                f"better than chance; the paper: {points(PAPER_MAJORLY)} % by a threshold that it "
                "does not say).",
            )
        ]

    def _task(self) -> list[tuple[bool, str]]:
        """Claim 3."""
        cosine, drop = (self.spreads.get(name) for name in ("cosine_score", DROP))
        if cosine is None or drop is None or cosine.raw_test is None:
            return []
        raw, clean = cosine.raw_test, cosine.clean_test
        sentence = (
            f"from benchmark to benchmark a layer's z-scored accuracy drop varies by "
            f"{two_digits(drop.raw)}, its cosine score by {two_digits(cosine.raw)} (larger in "
            f"{raw.larger} of {raw.n} layers, Wilcoxon p = {written_p(raw.p_value)}, in blocks of "
            f"neighbouring layers {written_p(raw.block_p)})"
        )
        if clean is None or drop.clean is None or cosine.clean is None:
            return [(False, f"{sentence}; how much of it is noise of the documents is open.")]
        sentence += (
            f"; without the noise of the documents the drop varies by {two_digits(drop.clean)}, "
            f"the cosine score by {two_digits(cosine.clean)} (p = {written_p(clean.p_value)}, in "
            f"blocks {written_p(clean.block_p)}), so that "
        )
        if clean.smallest_p >= LEVEL:
            return [(False, f"{sentence}so few layers leave the paper's third claim open.")]
        if clean.block_p < LEVEL:
            if drop.clean > cosine.clean:
                return [(False, f"{sentence}relevance depends on the task more than cosine says.")]
            sentence += "relevance depends on the task less than cosine says."
            return [(True, f"against the paper's third claim, {sentence}")]
        sentence += "relevance is not shown to depend on the task more than cosine says."
        if raw.block_p < LEVEL and drop.raw > cosine.raw:
            return [(True, f"the paper's third claim holds with the noise alone: {sentence}")]
        return [(False, sentence)]

    def _best(self) -> tuple[bool, str]:
        best = self.summaries[0]
        sentence = (
            f"{NAMES[best.proxy]} orders the layers best, with a mean Spearman of "
            f"{_with_interval(best)}"
        )
        cosine = next((s for s in self.summaries if s.proxy == "cosine_score"), None)
        if cosine is not None and cosine is not best and cosine.cells == best.cells:
            value = best.spearman - cosine.spearman
            ends = bias_corrected_interval(value, best.resampled - cosine.resampled)
            within = f" ({two_digits(ends[0])} to {two_digits(ends[1])})" if ends else ""
            sentence += (
                f": {two_digits(value)}{within} more than the cosine score, for "
                f"{passes(best.proxy, self.total, shared=True):g} times its forward passes"
            )
        return False, f"{sentence}. It is the best of {len(self.summaries)} on these documents."

    def _worth(self) -> list[tuple[bool, str]]:
        """Which one to trust, by what there is to spend."""
        budgets, by_name = self.at_cost
        stretches: list[tuple[str, float, float, float]] = []
        for i, budget in enumerate(budgets):
            there = {name: row[i] for name, row in by_name.items() if row[i] is not None}
            if not there:
                continue
            best = max(there, key=lambda name: there[name] or 0.0)
            value = there[best] or 0.0
            if stretches and stretches[-1][0] == best:
                stretches[-1] = (best, stretches[-1][1], budget, value)
            else:
                stretches.append((best, budget, budget, value))
        if not stretches:
            return []
        parts = [
            f"{NAMES.get(name, 'the accuracy drop itself')} "
            f"{'at' if low == high else 'from'} {low:,.0f}"
            f"{'' if low == high else f' to {high:,.0f}'} (Spearman {two_digits(value)} at the end)"
            for name, low, high, value in stretches
        ]
        itself = next((value for value in reversed(by_name[DROP]) if value is not None), None)
        most = (
            ""
            if itself is None
            else (
                " The drop of half of the documents predicts that of the other half at "
                f"{two_digits(itself)}: it is noisy, and a proxy with less noise may do better."
            )
        )
        return [
            (
                False,
                "which to trust depends on the forward passes that there are to spend on a "
                f"benchmark; of other documents' drops the best predictor is {', '.join(parts)}."
                f"{most}",
            )
        ]

    # Tables

    def tables(self) -> list[FoundTable]:
        """Every table of the model."""
        return [self._proxies(), self._benchmarks(), self._disagreements(), *self._variances()]

    def _proxies(self) -> FoundTable:
        rows: list[tuple[Entry, ...]] = []
        for each in self.summaries:
            worst = each.worst
            top, bottom, count = overlaps(each)
            rows.append(
                (
                    Entry(value=NAMES[each.proxy]),
                    Entry(value=each.spearman, low=each.low, high=each.high),
                    _entry(each.inner, "fewer than three inner layers"),
                    Entry(value=each.kendall),
                    Entry(
                        value=f"{worst.label}: "
                        f"{two_digits(worst.found[each.proxy].spearman.value or 0.0)}"
                    ),
                    Entry(value=top),
                    Entry(value=bottom),
                    Entry(value=count),
                    Entry(value=passes(each.proxy, self.total, shared=False)),
                    Entry(value=passes(each.proxy, self.total, shared=True)),
                    Entry(value=self.adjusted[each.proxy]),
                )
            )
        for proxy in (p for p in NAMES if all(p != s.proxy for s in self.summaries)):
            reasons = (cell.found[proxy].spearman.reason for cell in self.cells)
            why = next(filter(None, reasons), "undefined")
            rows.append((Entry(value=NAMES[proxy]), *[Entry(reason=why)] * 10))
        dear = passes(DROP, self.total, shared=True)
        return _table(
            f"{self.name}: how well each proxy orders the layers by their accuracy drop",
            [
                ("proxy", "text"),
                ("mean Spearman", "coefficient"),
                ("inner layers", "coefficient"),
                ("mean Kendall", "coefficient"),
                ("worst benchmark", "text"),
                (f"top-{TOP} overlap", "percent"),
                (f"bottom-{TOP} overlap", "percent"),
                ("by chance", "percent"),
                ("passes, naive", "times"),
                ("passes, shared", "times"),
                ("p (Holm)", "p"),
            ],
            rows,
            [
                f"{self._on}. Intervals are 95 % from resampling documents, benchmarks as they "
                "are; inner layers leave out the first and last two.",
                "Passes are forward passes of the whole model a document, for all layers together: "
                "one by one on pruned models, or sharing the layers below the removed one. The "
                f"accuracy drop itself takes {dear:g} shared, and once more its other answers.",
            ],
        )

    def _benchmarks(self) -> FoundTable:
        tested = [
            (cell, proxy, cell.found[proxy].spearman.p_value)
            for cell in self.cells
            for proxy in NAMES
        ]
        given = [p for _, _, p in tested if p is not None]
        adjusted = iter(stats.false_discovery_control(given) if given else [])
        rows = []
        for cell, proxy, p in tested:
            found = cell.found[proxy]
            why = found.spearman.reason or "fewer than three inner layers"
            at = found.spearman
            rows.append(
                (
                    Entry(value=cell.label),
                    Entry(value=NAMES[proxy]),
                    _entry(at.value, why, at.low, at.high),
                    _entry(found.inner, why),
                    _entry(found.kendall, why),
                    _entry(found.pearson, why),
                    _entry(p, why),
                    _entry(None if p is None else float(next(adjusted)), why),
                )
            )
        return _table(
            f"{self.name}: every proxy beside the accuracy drop, benchmark by benchmark",
            [
                ("benchmark", "text"),
                ("proxy", "text"),
                ("Spearman", "coefficient"),
                ("inner layers", "coefficient"),
                ("Kendall", "coefficient"),
                ("Pearson", "coefficient"),
                ("p", "p"),
                ("p (Benjamini-Hochberg)", "p"),
            ],
            rows,
            [
                "p-values are those of Spearman's coefficient against series as smooth over depth; "
                "adjusted over all rows of the table."
            ],
        )

    def _disagreements(self) -> FoundTable:
        rows = [
            (
                Entry(value=NAMES[proxy]),
                *(
                    Entry(value=value)
                    for each in found
                    for value in (each.share, each.chance, each.shuffled_p, each.smooth_p)
                ),
            )
            for proxy, found in self.orders.items()
        ]
        words = ("ranks differ", "by chance", "p, shuffled", "p, as smooth")
        units: tuple[Unit, ...] = ("percent", "percent", "p", "p")
        return _table(
            f"{self.name}: in how many layers the ranks differ",
            [
                ("proxy", "text"),
                *zip(words, units, strict=True),
                *zip(("majorly", "majorly by chance", *words[2:]), units, strict=True),
            ],
            rows,
            [
                f"Majorly: by more than {MAJOR:.0%} of the layers. Ties share their mean rank. "
                "p: how often orders that know nothing of each other differ as rarely, layers "
                "shuffled freely or as smooth over depth as they are; not adjusted."
            ],
        )

    def _variances(self) -> list[FoundTable]:
        if not self.spreads:
            return []
        names = {"relevance": "accuracy relevance", DROP: DROP, **NAMES}
        every = list(self.spreads.values())
        raw = dict(zip(self.spreads, holm([_p(s.raw_test) for s in every]), strict=True))
        clean = dict(zip(self.spreads, holm([_p(s.clean_test) for s in every]), strict=True))
        noisy = self.noisy or "too few benchmarks"
        rows = []
        for name, each in self.spreads.items():
            own = "it is what the proxies are held against"
            why = "its noise is that of the drop" if name == "relevance" else noisy
            rows.append(
                (
                    Entry(value=names[name]),
                    Entry(value=each.raw),
                    *_tested(each.raw_test, raw.get(name), own),
                    _entry(each.clean, why),
                    *_tested(
                        each.clean_test,
                        clean.get(name),
                        own if name in ("relevance", DROP) else why,
                    ),
                )
            )
        heads: list[tuple[str, Unit]] = [
            ("drop varies more in", "text"),
            ("Wilcoxon p (Holm)", "p"),
            (f"p in blocks of {BLOCK}", "p"),
        ]
        shares = ", ".join(
            f"{cell.label} {two_digits(self.reliabilities[cell.label])}"
            for cell in self.above_chance
        )
        return [
            _table(
                f"{self.name}: variance of a layer's z-score from benchmark to benchmark",
                [
                    ("measure", "text"),
                    ("variance", "coefficient"),
                    *heads,
                    ("variance without noise", "coefficient"),
                    *heads,
                ],
                rows,
                [
                    f"{counted(len(self.above_chance), 'benchmark')} above chance. z-scored over "
                    "layers per benchmark; mean over layers: 0 = layers matter alike everywhere, "
                    "1 = no two benchmarks have anything in common.",
                    "Relevance is the drop on another scale, but for layers that fall below "
                    "chance, so their z-scores are the same.",
                    "Share of the spread of drops over layers that is not noise of the documents: "
                    f"{shares}. Below {RELIABLE} a benchmark is left out where noise is taken off.",
                    "Wilcoxon's p takes layers as independent, which they are not: where it and "
                    "the p of signs that change in blocks differ, trust the latter.",
                ],
            )
        ]

    # Charts

    def charts(self) -> list[FoundChart]:
        """Every chart of the model."""
        return [*self._cost_chart(), *self._depth_chart(), *self._map()]

    def _cost_chart(self) -> list[FoundChart]:
        budgets, found = self.at_cost
        lines = [
            Line(name=NAMES.get(name, name), values=tuple(row))
            for name, row in found.items()
            if any(value is not None for value in row)
        ]
        if not lines:
            return []
        return [
            LineChart(
                title=f"{self.name}: what a proxy predicts for what it costs",
                x="forward passes spent on a benchmark",
                y="Spearman with the drop of other documents",
                unit="coefficient",
                places=tuple(budgets),
                lines=tuple(lines),
                log_x=True,
            )
        ]

    def _depth_chart(self) -> list[FoundChart]:
        shown = list(dict.fromkeys(["cosine_score", *(s.proxy for s in self.summaries[:1])]))
        named = [s for s in self.summaries if s.proxy in shown]
        if not named:
            return []
        cells = alike([c for c in named[0].cells if all(c in s.cells for s in named)])
        if not cells:
            return []
        profiles = {DROP: means(DROP, cells)}
        profiles |= {NAMES[s.proxy]: means(s.proxy, cells) for s in named}
        return [
            LineChart(
                title=f"{self.name}: ranks of the layers over depth, mean over benchmarks",
                x="layer (0-based)",
                y="rank, the least relevant is 1",
                unit="count",
                places=tuple(cells[0].layers),
                lines=tuple(
                    Line(name=name, values=tuple(midranks(rows).mean(axis=0).tolist()))
                    for name, rows in profiles.items()
                ),
            )
        ]

    def _map(self) -> list[FoundChart]:
        cells = [c for c in self.cells if c.found["cosine_score"].spearman.value is not None]
        if not cells:
            return []
        columns = sorted({layer for cell in cells for layer in cell.layers})
        values = []
        for cell in cells:
            x, y = (midranks(each.means()) for each in (cell.measures["cosine_score"], cell.drop))
            at = dict(zip(cell.layers, (x - y).tolist(), strict=True))
            values.append(tuple(at.get(layer) for layer in columns))
        return [
            MapChart(
                title=f"{self.name}: where the cosine score ranks a layer too high or too low",
                x="layer (0-based)",
                y="benchmark",
                name="ranks by cosine score above those by accuracy drop",
                unit="count",
                columns=tuple(columns),
                rows=tuple(cell.label for cell in cells),
                values=tuple(values),
            )
        ]

    def lacking(self) -> list[str]:
        """What could not be said, with what to do."""
        said = []
        if not self.spreads:
            said.append(
                f"{self.name}: whether relevance depends on the task (claim 3) {_ONE_BENCHMARK}; "
                "add e.g. benchmark: {values: [arc_easy, piqa, hellaswag]} and run the same "
                "command again"
            )
        elif self.spreads[DROP].clean is None:
            said.append(
                f"{self.name}: how much of the drop's variance from benchmark to benchmark is "
                f"noise of the documents: {self.noisy or 'too few benchmarks'}; raise sample: "
                "and run the same command again"
            )
        return said


# Entries


def _with_interval(summary: Summary) -> str:
    if summary.low is None or summary.high is None:
        return two_digits(summary.spearman)
    return (
        f"{two_digits(summary.spearman)} ({two_digits(summary.low)} to {two_digits(summary.high)})"
    )


def _entry(
    value: float | None, why: str, low: float | None = None, high: float | None = None
) -> Entry:
    return Entry(reason=why) if value is None else Entry(value=value, low=low, high=high)


def _p(test: Paired | None) -> float | None:
    return None if test is None else test.p_value


def _tested(test: Paired | None, adjusted: float | None, why: str) -> tuple[Entry, Entry, Entry]:
    if test is None:
        return (Entry(reason=why),) * 3
    return (
        Entry(value=f"{test.larger} of {test.n} layers"),
        _entry(adjusted, why),
        Entry(value=test.block_p),
    )


def _table(
    title: str,
    headings: Sequence[tuple[str, Unit]],
    rows: Sequence[tuple[Entry, ...]],
    notes: Sequence[str],
) -> FoundTable:
    return FoundTable(
        title=title,
        headings=tuple(Heading(label=label, unit=unit) for label, unit in headings),
        rows=tuple(rows),
        notes=tuple(notes),
    )


_ASSUMPTIONS = (
    "Documents are drawn independently within each benchmark; intervals say what other documents "
    "would give for these layers and benchmarks, not what other benchmarks would.",
    "p-values of coefficients redraw one series as smooth over depth as it is (AR(1) under a "
    "monotonic function; Theiler et al. 1992), not freely shuffled; means over benchmarks relabel "
    "the layers of all benchmarks alike. Holm (1979) over proxies, Benjamini-Hochberg (1995) over "
    "proxies × benchmarks.",
    "Noise of the documents is taken off a variance as the sampling variance of each drop, from "
    "the documents' own drops; benchmarks share no documents.",
    "A logit-lens change is a token whose most likely successor by the model's own final norm and "
    "head (nostalgebraist 2020) differs between a layer's input and its output. First-order Taylor "
    "is the size of the derivative of a document's loss by a gate on the layer's update, averaged "
    "over documents (Michel et al. 2019, Molchanov et al. 2019).",
)
