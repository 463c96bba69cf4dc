"""The audit's tables, of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy import stats

from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import counted, two_digits
from tracker.core.proxies import PROXIES, passes
from tracker.core.tables import Column, Table, Value, estimate, table
from tracker.stats.multiple import holm
from tracker.stats.task_dependence import BLOCK
from tracker.studies.audit.figures import (
    MAJOR,
    RELIABLE,
    TOP,
    ModelAudit,
    Spreads,
    Summary,
    overlaps,
)
from tracker.studies.audit.measures import DROP, Audited, Ordering
from tracker.studies.base import FEWEST


def tables_of(audit: ModelAudit) -> list[Table]:
    """Every table of the model."""
    return [_proxies(audit), _benchmarks(audit), _disagreements(audit), *_variances(audit)]


def _proxies(audit: ModelAudit) -> Table:
    summaries = {each.proxy: each for each in audit.summaries}
    shared = {each.proxy: overlaps(each) for each in audit.summaries}

    def column(label: str, unit: Unit, value: Callable[[Summary], Value]) -> Column[str]:
        def entry(proxy: str) -> Value:
            if proxy in summaries:
                return value(summaries[proxy])
            reasons = (cell.found[proxy].spearman.reason for cell in audit.cells)
            return Estimate(None, reason=next(filter(None, reasons), "undefined"))

        return Column(label, unit, entry)

    def worst(each: Summary) -> str:
        spearman = each.worst.found[each.proxy].spearman
        return f"{each.worst.label}: {two_digits(spearman.value or 0.0)}"

    total = audit.total
    columns = [
        Column("proxy", "text", lambda proxy: PROXIES[proxy].label),
        column("mean Spearman", "coefficient", lambda s: Estimate(s.spearman, s.low, s.high)),
        column("inner layers", "coefficient", lambda s: estimate(s.inner, _no_inner(s.cells))),
        column("mean Kendall", "coefficient", lambda s: s.kendall),
        column("worst benchmark", "text", worst),
        column(f"top-{TOP} overlap", "percent", lambda s: shared[s.proxy][0]),
        column(f"bottom-{TOP} overlap", "percent", lambda s: shared[s.proxy][1]),
        column("by chance", "percent", lambda s: shared[s.proxy][2]),
        column("passes, naive", "times", lambda s: passes(s.proxy, total, shared=False)),
        column("passes, shared", "times", lambda s: passes(s.proxy, total, shared=True)),
        column("p (Holm)", "p", lambda s: audit.adjusted[s.proxy]),
    ]
    dear = passes(DROP, total, shared=True)
    return table(
        f"{audit.name}: how well each proxy orders the layers by their {audit.drop}",
        columns,
        [*summaries, *(proxy for proxy in PROXIES if proxy not in summaries)],
        [
            f"{audit.on}. Intervals are 95 % from resampling documents, benchmarks as they "
            "are; inner layers leave out the first and last two.",
            "Passes are forward passes of the whole model a document, for all layers together: "
            "one by one on pruned models, or sharing the layers below the removed one. The "
            f"{audit.drop} itself takes {dear:g} shared, and once more its other answers.",
            "Sources: "
            + "; ".join(f"{p.label}: {p.source}" for p in PROXIES.values() if p.source)
            + ".",
        ],
    )


def _no_inner(cells: Sequence[Audited]) -> str:
    if all(len(cell.inner) < FEWEST for cell in cells):
        return "fewer than three inner layers"
    return "the inner layers all have the same drop or the same proxy"


class _Tested(NamedTuple):
    """A row: a proxy on a benchmark, with its p-value adjusted."""

    cell: Audited
    proxy: str
    adjusted: float | None

    @property
    def found(self) -> Ordering:
        """How well it orders the layers."""
        return self.cell.found[self.proxy]

    def entry(self, value: float | None) -> Estimate:
        """Make an entry, or say why it is undefined."""
        return estimate(value, self.found.spearman.reason or _no_inner([self.cell]))


def _benchmarks(audit: ModelAudit) -> Table:
    tested = [(cell, proxy) for cell in audit.cells for proxy in PROXIES]
    p_values = [cell.found[proxy].spearman.p_value for cell, proxy in tested]
    given = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(given) if given else [])
    rows = [
        _Tested(cell, proxy, None if p is None else float(next(adjusted)))
        for (cell, proxy), p in zip(tested, p_values, strict=True)
    ]
    columns: tuple[Column[_Tested], ...] = (
        Column("benchmark", "text", lambda row: row.cell.label),
        Column("proxy", "text", lambda row: PROXIES[row.proxy].label),
        Column("Spearman", "coefficient", lambda row: row.found.spearman),
        Column("inner layers", "coefficient", lambda row: row.entry(row.found.inner)),
        Column("Kendall", "coefficient", lambda row: row.entry(row.found.kendall)),
        Column("Pearson", "coefficient", lambda row: row.entry(row.found.pearson)),
        Column("p", "p", lambda row: row.entry(row.found.spearman.p_value)),
        Column("p (Benjamini-Hochberg)", "p", lambda row: row.entry(row.adjusted)),
    )
    return table(
        f"{audit.name}: every proxy beside the {audit.drop}, benchmark by benchmark",
        columns,
        rows,
        [
            "p-values are those of Spearman's coefficient against series as smooth over depth; "
            "adjusted over all rows of the table."
        ],
    )


def _disagreements(audit: ModelAudit) -> Table:
    def columns(words: Sequence[str], place: int) -> list[Column[str]]:
        """State four columns of ranks that differ (place 0), or do so majorly (1)."""
        differ, chance, shuffled, smooth = words
        return [
            Column(differ, "percent", lambda proxy: audit.orders[proxy][place].share),
            Column(chance, "percent", lambda proxy: audit.orders[proxy][place].chance),
            Column(shuffled, "p", lambda proxy: audit.orders[proxy][place].shuffled_p),
            Column(smooth, "p", lambda proxy: audit.orders[proxy][place].smooth_p),
        ]

    ends = ("", " by chance", ": p, shuffled", ": p, as smooth")
    return table(
        f"{audit.name}: in how many layers the ranks differ",
        [
            Column("proxy", "text", lambda proxy: PROXIES[proxy].label),
            *columns(("ranks differ", "by chance", "p, shuffled", "p, as smooth"), 0),
            *columns([f"majorly{end}" for end in ends], 1),
        ],
        audit.orders,
        [
            f"Majorly: by more than {MAJOR:.0%} of the layers. Ties share their mean rank. "
            "p: how often orders that know nothing of each other differ as rarely, layers "
            "shuffled freely or as smooth over depth as they are; not adjusted."
        ],
    )


def _variances(audit: ModelAudit) -> list[Table]:
    if not audit.spreads:
        return []
    names = {"relevance": "accuracy relevance", DROP: DROP}
    names |= {name: proxy.label for name, proxy in PROXIES.items()}
    tests = [spread.test for spread in audit.spreads.values()]
    p_values = [None if test is None else test.p_value for test in tests]
    adjusted = dict(zip(audit.spreads, holm(p_values), strict=True))
    own = "it is what the proxies are held against"

    def column(
        label: str, unit: Unit, value: Callable[[Spreads], Value], otherwise: str = ""
    ) -> Column[str]:
        def entry(name: str) -> Value:
            found = value(audit.spreads[name])
            if found is None:
                return Estimate(None, reason=otherwise or audit.spreads[name].reason)
            return found

        return Column(label, unit, entry, own)

    def larger(each: Spreads) -> str | None:
        return f"{each.test.larger} of {each.test.n} layers" if each.test else None

    columns = [
        Column("measure", "text", names.__getitem__),
        column("variance", "coefficient", lambda each: each.raw),
        column("drop varies more in", "text", larger, own),
        Column("Wilcoxon p (Holm)", "p", adjusted.__getitem__, own),
        column(f"p in blocks of {BLOCK}", "p", lambda s: s.test.block_p if s.test else None, own),
        column("variance where noise can be taken off", "coefficient", lambda s: s.noisy),
        column("variance without noise", "coefficient", lambda s: s.clean),
        column("drop's without noise exceeds it by", "coefficient", lambda s: s.excess),
    ]
    shares = ", ".join(
        f"{cell.label} {two_digits(audit.reliabilities[cell.label])}" for cell in audit.above_chance
    )
    return [
        table(
            f"{audit.name}: variance of a layer's z-score from benchmark to benchmark",
            columns,
            audit.spreads,
            [
                f"{counted(len(audit.above_chance), 'benchmark')} above chance. z-scored over "
                "layers per benchmark; mean over layers: 0 = layers matter alike everywhere, "
                "1 = no two benchmarks have anything in common.",
                "Relevance is the drop on another scale, but for layers that fall below "
                "chance, so their z-scores are the same.",
                "Share of the spread of drops over layers that is not noise of the documents: "
                f"{shares}. Below {RELIABLE} a benchmark is left out where noise is taken off, "
                f"which leaves {counted(len(audit.reliable), 'benchmark')} for the last three "
                "columns. Their interval is the jackknife over documents.",
                "Wilcoxon's p takes layers as independent, which they are not: where it and "
                "the p of signs that change in blocks differ, trust the latter.",
            ],
        )
    ]
