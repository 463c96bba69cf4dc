"""The audit's tables, of one model."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats

from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import counted, two_digits
from tracker.core.proxies import PROXIES, passes
from tracker.core.tables import Table
from tracker.stats.multiple import holm
from tracker.stats.task_dependence import BLOCK, Paired
from tracker.studies.audit.figures import MAJOR, RELIABLE, TOP, ModelAudit, overlaps
from tracker.studies.audit.measures import DROP, Audited
from tracker.studies.base import FEWEST
from tracker.studies.layout import Row, entry, estimated, table


def tables_of(audit: ModelAudit) -> list[Table]:
    """Every table of the model."""
    return [_proxies(audit), _benchmarks(audit), _disagreements(audit), *_variances(audit)]


def _proxies(audit: ModelAudit) -> Table:
    rows: list[Row] = []
    for each in audit.summaries:
        worst = each.worst
        rows.append(
            (
                PROXIES[each.proxy].label,
                entry(each.spearman, low=each.low, high=each.high),
                entry(each.inner, _no_inner(each.cells)),
                each.kendall,
                f"{worst.label}: {two_digits(worst.found[each.proxy].spearman.value or 0.0)}",
                *overlaps(each),
                passes(each.proxy, audit.total, shared=False),
                passes(each.proxy, audit.total, shared=True),
                audit.adjusted[each.proxy],
            )
        )
    for proxy in (p for p in PROXIES if all(p != s.proxy for s in audit.summaries)):
        reasons = (cell.found[proxy].spearman.reason for cell in audit.cells)
        why = next(filter(None, reasons), "undefined")
        rows.append((PROXIES[proxy].label, *[Estimate(None, reason=why)] * 10))
    dear = passes(DROP, audit.total, shared=True)
    return table(
        f"{audit.name}: how well each proxy orders the layers by their {audit.drop}",
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


def _benchmarks(audit: ModelAudit) -> Table:
    tested = [
        (cell, proxy, cell.found[proxy].spearman.p_value)
        for cell in audit.cells
        for proxy in PROXIES
    ]
    given = [p for _, _, p in tested if p is not None]
    adjusted = iter(stats.false_discovery_control(given) if given else [])
    rows: list[Row] = []
    for cell, proxy, p in tested:
        found = cell.found[proxy]
        why = found.spearman.reason or _no_inner([cell])
        rows.append(
            (
                cell.label,
                PROXIES[proxy].label,
                estimated(found.spearman, why),
                entry(found.inner, why),
                entry(found.kendall, why),
                entry(found.pearson, why),
                entry(p, why),
                entry(None if p is None else float(next(adjusted)), why),
            )
        )
    return table(
        f"{audit.name}: every proxy beside the {audit.drop}, benchmark by benchmark",
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


def _disagreements(audit: ModelAudit) -> Table:
    rows: list[Row] = [
        (
            PROXIES[proxy].label,
            *(
                value
                for each in found
                for value in (each.share, each.chance, each.shuffled_p, each.smooth_p)
            ),
        )
        for proxy, found in audit.orders.items()
    ]
    words = ("ranks differ", "by chance", "p, shuffled", "p, as smooth")
    units: tuple[Unit, ...] = ("percent", "percent", "p", "p")
    return table(
        f"{audit.name}: in how many layers the ranks differ",
        [
            ("proxy", "text"),
            *zip(words, units, strict=True),
            *zip(
                (f"majorly{end}" for end in ("", " by chance", ": p, shuffled", ": p, as smooth")),
                units,
                strict=True,
            ),
        ],
        rows,
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
    every = list(audit.spreads.values())
    tests = [None if spread.test is None else spread.test.p_value for spread in every]
    adjusted = dict(zip(audit.spreads, holm(tests), strict=True))
    rows: list[Row] = []
    for name, each in audit.spreads.items():
        own = "it is what the proxies are held against"
        rows.append(
            (
                names[name],
                each.raw,
                *_tested(each.test, adjusted[name], own),
                entry(each.noisy, each.reason),
                entry(each.clean, each.reason),
                estimated(each.excess, each.reason or own),
            )
        )
    shares = ", ".join(
        f"{cell.label} {two_digits(audit.reliabilities[cell.label])}" for cell in audit.above_chance
    )
    return [
        table(
            f"{audit.name}: variance of a layer's z-score from benchmark to benchmark",
            [
                ("measure", "text"),
                ("variance", "coefficient"),
                ("drop varies more in", "text"),
                ("Wilcoxon p (Holm)", "p"),
                (f"p in blocks of {BLOCK}", "p"),
                ("variance where noise can be taken off", "coefficient"),
                ("variance without noise", "coefficient"),
                ("drop's without noise exceeds it by", "coefficient"),
            ],
            rows,
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


def _tested(test: Paired | None, adjusted: float | None, why: str) -> Row:
    if test is None:
        return (Estimate(None, reason=why),) * 3
    return (f"{test.larger} of {test.n} layers", entry(adjusted, why), test.block_p)
