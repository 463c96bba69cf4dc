"""The tables of the study `snowball`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tracker.core.estimates import Estimate, Unit
from tracker.core.records import CellRecord, RunRecord
from tracker.core.tables import Table
from tracker.studies.layout import Row, entry, estimated, table
from tracker.studies.snowball.figures import ALL, COSINE, END, LAST, Figures

NOT_MEASURED = "its removal is not measured; add the layer to 'layer' in the file"
_VERDICTS = {1: "grows", -1: "shrinks", 0: "undecided"}


def layer_table(each: Figures) -> Table:
    """One row a layer: where the difference begins and ends, and what its removal costs."""
    tokens, explained, runs = each.tokens[ALL], each.explained, each.cell.runs_of()
    removed = tokens.removed
    by_cosine = explained.ranks(explained.cosine) if explained else {}
    by_drop = explained.ranks(explained.drops) if explained else {}
    rows: list[Row] = []
    for layer, (total, sign) in enumerate(zip(removed.total, removed.signs, strict=True)):
        run, why = runs.get(layer), total.reason or LAST
        steps = len(removed.total) - 1 - layer
        rows.append(
            (
                layer,
                entry(removed.paths[layer, layer], "not finite"),
                entry(removed.paths[layer, -1], "not finite"),
                estimated(total),
                entry(removed.a_layer(layer), why),
                Estimate(None, reason=why)
                if total.value is None
                else f"{removed.growing_steps(layer)} of {steps}",
                Estimate(None, reason=why) if sign is None else _VERDICTS[sign],
                entry(tokens.random.total[layer].value, why),
                entry(tokens.shuffled.total[layer].value, why),
                entry(tokens.handed_on[layer].value, why),
                _drop(each.cell, run) if run else Estimate(None, reason=NOT_MEASURED),
                entry(by_cosine.get(layer), NOT_MEASURED),
                entry(by_drop.get(layer), NOT_MEASURED),
            )
        )
    return table(
        f"{each.cell.heading}: the relative difference after each layer's removal",
        (
            ("layer", "count"),
            ("behind it", "percent"),
            ("before the head", "percent"),
            ("growth", "times"),
            ("a layer", "times"),
            ("growing steps", "text"),
            ("verdict", "text"),
            ("random", "times"),
            ("other tokens'", "times"),
            ("as handed on", "times"),
            ("drop", _drop_unit(each)),
            ("cosine rank", "count"),
            ("drop rank", "count"),
        ),
        rows,
        (
            f"{each.documents} documents; geometric means over them, growth with 95 % intervals "
            "from resampling them. Verdict: Wilcoxon's signed rank test, Holm over layers, 5 %, "
            "and an interval without 1.",
            "random, other tokens': growth of random directions and of other tokens' updates of "
            "the same norm. As handed on: how many times as large as if all later layers had "
            "handed the difference on as it was. Rank 1: the largest cosine score or drop; equal "
            "ones share a rank.",
        ),
    )


def _drop(cell: CellRecord, run: RunRecord) -> Estimate:
    low, high = run.accuracy_drop_low, run.accuracy_drop_high
    return entry(run.accuracy_drop, cell.reason_of("accuracy_drop", run), low, high)


def _drop_unit(each: Figures) -> Unit:
    return "points" if each.cell.higher_is_better else "score"


def predictors(each: Figures) -> Table:
    """What orders the layers as their drops do, and what cosine leaves over."""
    explained = each.explained
    rows: list[Row] = []
    if explained is not None:
        for name, found in explained.predictors.items():
            better = explained.better.get(name)
            rows.append(
                (
                    name,
                    "drop",
                    estimated(found),
                    entry(found.p_value, found.reason),
                    estimated(better, "it is the one compared with"),
                    len(explained.layers),
                )
            )
        for name, found in explained.partial.items():
            rows.append(
                (
                    name,
                    "drop, cosine score held fixed",
                    estimated(found),
                    entry(found.p_value, found.reason),
                    Estimate(None, reason="a partial correlation is compared with none"),
                    explained.followed,
                )
            )
    return table(
        f"{each.cell.heading}: what orders the layers as their drops do",
        (
            ("of each layer", "text"),
            ("beside", "text"),
            ("Spearman", "coefficient"),
            ("p", "p"),
            ("better than cosine by", "coefficient"),
            ("layers", "count"),
        ),
        rows,
        (
            "Intervals: documents drawn anew. p: against series as smooth over depth that are "
            "unrelated; not adjusted for the number of rows.",
        ),
    )


def summary(found: Sequence[Figures]) -> Table:
    """One row a cell."""
    rows: list[Row] = []
    for each in found:
        tokens = each.tokens[ALL]
        signs, beside = Counter(tokens.removed.signs), Counter(tokens.beside_signs)
        explained = each.explained
        rows.append(
            (
                each.cell.model.name,
                each.cell.benchmark.title,
                each.documents,
                signs[1],
                signs[-1],
                signs[0],
                entry(tokens.removed.median, "no layer's growth is defined"),
                entry(tokens.random.median, "no layer's growth is defined"),
                beside[1],
                beside[-1],
                estimated(explained.predictors[COSINE] if explained else None, NOT_MEASURED),
                estimated(explained.predictors[END] if explained else None, NOT_MEASURED),
                estimated(
                    explained.partial["growth after removal"] if explained else None, NOT_MEASURED
                ),
            )
        )
    return table(
        "Does it snowball?",
        (
            ("model", "text"),
            ("benchmark", "text"),
            ("documents", "count"),
            ("layers that grow", "count"),
            ("shrink", "count"),
            ("undecided", "count"),
            ("median growth", "times"),
            ("of random directions", "times"),
            ("removal grows more", "count"),
            ("less", "count"),
            ("cosine ~ drop", "coefficient"),
            ("before the head ~ drop", "coefficient"),
            ("growth ~ drop given cosine", "coefficient"),
        ),
        rows,
        ("~: Spearman's coefficient over layers, with 95 % intervals over documents.",),
    )
