"""What is shown of one model's layers, what is open, and how that is said.

A page, a terminal, a leaderboard and a tracker name a layer where this module does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from tracker.analysis.comparable import countable
from tracker.analysis.labels import benchmark_labels
from tracker.analysis.paired import outcome_variance
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, listed, measure_of, p_value
from tracker.core.grouping import grouped
from tracker.core.records import CellRecord, RunRecord
from tracker.core.text import capital
from tracker.stats.combined import mean
from tracker.stats.power import ALPHA, MEANT, documents_needed
from tracker.stats.support import Verdict, pairs, ranks, together, verdicts

SMALL = MEANT
"""A drop below this, a fraction, is called small."""
_LOSSES = (SMALL, 0.03, 0.02, 0.01)
"""The losses for which a number of documents is named, the first that takes more than there are."""
SMALL_IN_WORDS = f"{100 * SMALL:g} pp"
FIRST = 5
"""A layer that is surely among so many largest falls of log-probability is named."""
_NAMED = 10
"""So many layers that cost little are named; of more it is said how many they are."""

_ByCell = dict[str, dict[int, Estimate]]
"""A cell's key → layer → a figure, whose interval holds together with all others."""


@dataclass(frozen=True)
class Claims:
    """What is shown of the whole layers of one model, on average over some benchmarks.

    With probability 95 % or more everything that `costly`, `helpful` and `small` name is so, all of
    it together; likewise what `falling` names, and `broken`. Layers are by their 0-based number.

    Attributes:
        cells: The measurements that it rests on, one a benchmark, each of all `layers`.
        layers: The layers that are measured on all of these benchmarks.
        drops: Layer → its mean drop (or loss increase), with an interval that holds for all layers.
        verdicts: Layer → what is shown of it.
        gold: The falls of the right answer's log-probability, benchmark by benchmark.
        options: The falls of the log-probability of all options together.
    """

    cells: tuple[CellRecord, ...]
    layers: tuple[int, ...]
    drops: dict[int, Estimate]
    verdicts: dict[int, Verdict]
    gold: _ByCell
    options: _ByCell

    @property
    def costly(self) -> list[int]:
        """The layers that are shown to matter."""
        return [layer for layer in self.layers if self.verdicts[layer] == "costs"]

    @property
    def helpful(self) -> list[int]:
        """The layers without which the model is shown to do better."""
        return [layer for layer in self.layers if self.verdicts[layer] == "helps"]

    @property
    def small(self) -> list[int]:
        """The layers that are shown to cost less than `SMALL`."""
        if not self.is_accuracy:
            return []
        return [layer for layer in self.layers if _is_small(self.drops[layer])]

    @property
    def open(self) -> list[int]:
        """The layers of which nothing of this is shown."""
        known = {*self.costly, *self.helpful, *self.small}
        return [layer for layer in self.layers if layer not in known]

    @property
    def by_cosine(self) -> list[int]:
        """As many layers as are costly, those of the highest mean cosine scores; none without."""
        runs = [cell.runs_of() for cell in self.cells]
        scores = {
            layer: sum(score for score in mine if score is not None)
            for layer in self.layers
            if None not in (mine := [of[layer].cosine_score for of in runs])
        }
        if len(scores) < len(self.layers):
            return []
        return sorted(scores, key=lambda layer: (-scores[layer], layer))[: len(self.costly)]

    @property
    def missed(self) -> list[int]:
        """The costly layers that a choice of as many by mean cosine score leaves out, for others
        that are shown to cost less."""
        costly, taken = self.costly, self.by_cosine
        ends = (self.drops[layer].high for layer in taken if layer not in costly)
        least = min((high for high in ends if high is not None), default=math.inf)
        left_out = [layer for layer in costly if layer not in taken]
        return [layer for layer in left_out if least < _low(self.drops, layer)]

    @property
    def falling(self) -> dict[int, list[CellRecord]]:
        """The layers whose removal is shown to be among the `FIRST` that lower the log-probability
        of the right answer most → on which benchmarks."""
        found: dict[int, list[CellRecord]] = {}
        for cell in self.cells:
            falls = self.gold[cell.key]
            for layer, (_, worst) in zip(falls, ranks([*falls.values()]), strict=True):
                if worst <= FIRST and _low(falls, layer) > 0:
                    found.setdefault(layer, []).append(cell)
        return found

    @property
    def broken(self) -> list[int]:
        """The layers without which all options together are shown to become unlikely on a
        benchmark: they keep a tenth of their probability at most, and their logarithm falls by half
        of itself at least."""

        def is_broken(cell: CellRecord, layer: int) -> bool:
            surprise = -(cell.baseline_options_logprob or 0.0)
            return _low(self.options[cell.key], layer) > max(math.log(10), surprise / 2)

        return [lay for lay in self.layers if any(is_broken(cell, lay) for cell in self.cells)]

    @property
    def is_accuracy(self) -> bool:
        """Whether drops are of accuracies, and no increases of a loss."""
        return all(cell.higher_is_better for cell in self.cells)

    def word(self, layer: int) -> str:
        """Say in a word or two what is shown of a layer."""
        if layer not in self.layers:
            return "not measured on all benchmarks"
        return shown_word(self.verdicts[layer], self.drops[layer], self.is_accuracy)

    def settled_by(self) -> tuple[float, int] | None:
        """Find the loss that more documents would reveal, and how many of each benchmark.

        The first one of `_LOSSES` that takes more than are measured, under half of the open layers
        or more. None where nothing is open, figures are no accuracies, or no outcome has changed.
        """
        undecided = {*self.open} if self.is_accuracy else set()
        runs = [
            run for cell in self.cells for run in cell.whole_layers if run.change.layer in undecided
        ]
        variances = list(filter(None, map(outcome_variance, runs)))
        for loss in _LOSSES if variances else ():
            needed = documents_needed(variances, len(self.layers), len(self.cells), loss)
            if needed > min(cell.n for cell in self.cells):
                return loss, needed
        return None

    def lacking(self, documents: int) -> list[CellRecord]:
        """Return the measurements whose benchmark has fewer documents."""
        return [cell for cell in self.cells if cell.benchmark.documents < documents]


def claims(cells: Sequence[CellRecord]) -> Claims:
    """Find what is shown of one model's layers.

    Args:
        cells: Its measurements. One a benchmark counts, as on a leaderboard; what was stopped at an
            answer does not: its answer says what is shown. Where none counts, as of losses, it is
            the first one whose layers were all measured on the same documents.

    Returns:
        What is shown, and what is open.
    """
    counting: Sequence[CellRecord] = countable(cells)[0]
    if not counting:
        counting = [c for c in cells if c.whole_layers and not c.is_raced and not c.removed][:1]
    every = [{run.change.layer for run in cell.whole_layers} for cell in counting]
    layers = tuple(sorted(set.intersection(*every))) if every else ()
    runs = [cell.runs_of() for cell in counting]
    drops = {layer: mean_drop([of[layer] for of in runs], len(layers)) for layer in layers}
    return Claims(
        cells=tuple(counting),
        layers=layers,
        drops=drops,
        verdicts=dict(zip(layers, verdicts([*drops.values()]), strict=True)),
        gold=_together(counting, layers, lambda run: run.gold_drop, pairs(len(layers))),
        options=_together(counting, layers, lambda run: run.options_drop),
    )


def mean_drop(runs: Sequence[RunRecord], family: int) -> Estimate:
    """Average what one thing costs, with an interval that holds for a family of things.

    Args:
        runs: Its run on each benchmark.
        family: How many things there are.

    Returns:
        The mean drop.
    """
    wide = together([run.drop for run in runs], [run.n for run in runs], family)
    return mean(wide) if len(wide) > 1 else wide[0]  # with its exact test


def shown_word(verdict: Verdict, drop: Estimate, is_accuracy: bool = True) -> str:
    """Say in a word or two what is shown of a removal, of its drop or increase of a loss."""
    if verdict == "costs":
        return "matters"
    if verdict == "helps":
        return "better without"
    return f"below {SMALL_IN_WORDS}" if is_accuracy and _is_small(drop) else "open"


def _is_small(drop: Estimate) -> bool:
    return drop.high is not None and drop.high < SMALL


def parts_answer(cell: CellRecord) -> str:
    """Say what is shown of a cell's heads, experts and stretches, those of a kind all at once.

    Args:
        cell: The cell.

    Returns:
        For example `Of 270 heads 2 are shown to cost accuracy: layer 3 head 5, layer 0 head 1.`;
        empty where it has no such runs.
    """
    sentences = []
    for family, runs in grouped(cell.runs, lambda run: run.change.kind.family).items():
        if family.many:
            by_change = shown_runs(cell, runs)
            largest_first = sorted(runs, key=lambda run: -(run.drop.value or 0.0))
            shown = {run.change.label(): by_change[run.change] for run in largest_first}
            level = measure_of(cell).level
            sentence = shown_sentence(family.many, shown, level, cell.higher_is_better)
            sentences.append(f"{sentence}.")
    return " ".join(sentences)


def shown_sentence(
    what: str, shown: Mapping[str, Verdict], level: str, higher_is_better: bool = True
) -> str:
    """Say of things of one sort what is shown of them.

    Args:
        what: What they are called.
        shown: The label of each, from the largest drop to the smallest → what is shown of it.
        level: What they cost.
        higher_is_better: Whether that is an accuracy or the like.

    Returns:
        A sentence without its end.
    """
    costs, helps = ("cost", "raise") if higher_is_better else ("raise", "lower")
    if len(shown) == 1:
        ((label, verdict),) = shown.items()
        does = {"costs": costs, "helps": helps}.get(verdict)
        return f"{label} is {f'shown to {does}' if does else 'not shown to change'} {level}"
    clauses = []
    for verdict, does, order in (
        ("costs", costs, [*shown]),
        ("helps", helps, [*shown][::-1]),
    ):
        names = [label for label in order if shown[label] == verdict]
        if names:
            rest = [f"{len(names) - FIRST} more"] if len(names) > FIRST else []
            are = "is" if len(names) == 1 else "are"
            named = listed([*names[:FIRST], *rest])
            clauses.append(f"{len(names)} {are} shown to {does} {level}: {named}")
    return f"Of {len(shown):,} {what} {'; '.join(clauses) or f'none is shown to change {level}'}"


def alone_sentence(cell: CellRecord, average: bool) -> str:
    """Return how many runs of a benchmark are open; `average` says that a mean is shown above."""
    verdict = shown_runs(cell, cell.runs)
    defined = [run for run in cell.runs if run.drop.value is not None]
    count = sum(verdict[run.change] == "open" for run in defined)
    noun = "layer" if all(run.change.kind == WHOLE_LAYER for run in cell.runs) else "run"
    total, every = len(cell.runs), counted(len(cell.runs), noun)
    subject = f"none of the {every} can" if count == total else f"{count} of {every} cannot"
    text = f"{subject} be told from chance" if total > 1 else f"{every} is open"
    if average:
        text = f"on this benchmark alone, {text} (the average above can say more)"
    return capital(text) if count else ""


def controls_answer(cell: CellRecord) -> str:
    """Hold what layers cost together against sets of as many that were drawn at random.

    Of one set p is the share of the drawn ones, itself counted among them, that cost as little or
    as much, twice the smaller one: it assumes that the set is as good as drawn, if its layers are
    like any others. Several sets that share layers have no such p.

    Args:
        cell: The cell.

    Returns:
        A sentence for each size; empty where none was drawn.
    """
    measure = measure_of(cell)
    known = [
        run for run in cell.runs if run.change.kind.word == "layer" and run.drop.value is not None
    ]
    sentences = []
    for size, runs in grouped(known, lambda run: run.change.span).items():
        mine = [run.drop.value or 0.0 for run in runs if not run.change.drawn]
        drawn = [run.drop.value or 0.0 for run in runs if run.change.drawn]
        if not mine or not drawn:
            continue
        ends = " to ".join(measure.write(each) for each in (min(drawn), max(drawn)))
        which = "the set" if len(mine) == 1 else f"{len(mine)} sets, on average"
        text = (
            f"{size} layers removed together: {measure.change} "
            f"{measure.write(sum(mine) / len(mine))} {measure.unit} ({which}), "
            f"{measure.write(sum(drawn) / len(drawn))} of {len(drawn)} sets drawn at random "
            f"({ends})"
        )
        if len(mine) == 1:
            less, more = sum(one <= mine[0] for one in drawn), sum(one >= mine[0] for one in drawn)
            p = min(1.0, 2 * (min(less, more) + 1) / (len(drawn) + 1))
            shown = "is shown to differ" if p < ALPHA else "is not shown to differ"
            text += f". It {shown} from these (p = {p_value(p)})"
        sentences.append(f"{text}.")
    return " ".join(sentences)


def shown_runs(cell: CellRecord, runs: Sequence[RunRecord]) -> dict[Change, Verdict]:
    """Decide what is shown of runs of one cell, all of it at once.

    Args:
        cell: The cell. The confidence sequences of one that a question stopped hold for all runs
            already.
        runs: Its runs that stand side by side.

    Returns:
        What is shown of each run's change.
    """
    shown = verdicts(_all_at_once(cell, runs, len(runs)))
    return dict(zip((run.change for run in runs), shown, strict=True))


def shown_words(cell: CellRecord) -> dict[Change, str]:
    """Return in a word or two what is shown of each run of a cell, all runs of its kind at once.

    Args:
        cell: The cell.

    Returns:
        A run's order → its `shown_word`; runs without a drop have none.
    """
    families = grouped(
        cell.runs, lambda run: (run.change.kind == WHOLE_LAYER, run.change.kind.family)
    )
    words = {}
    for runs in families.values():
        drops = _all_at_once(cell, runs, len(runs))
        for run, drop, verdict in zip(runs, drops, verdicts(drops), strict=True):
            if drop.value is not None:
                words[run.change] = shown_word(verdict, drop, cell.higher_is_better)
    return words


def ranks_in(cell: CellRecord, runs: Sequence[RunRecord]) -> list[tuple[int, int]]:
    """Say between which ranks runs of one cell lie by what they cost, all of it at once.

    Args:
        cell: The cell.
        runs: Its runs.

    Returns:
        The best and the worst rank of each, 1 for the largest drop.
    """
    return ranks(_all_at_once(cell, runs, pairs(len(runs))))


def answer(found: Claims) -> str:
    """Say in a few short sentences what is shown of a model's layers, and what is open.

    Args:
        found: What is shown.

    Returns:
        For example `Accuracy on arc_easy and piqa falls without layer 0, 1 or 11. Only layer 17 is
        shown to cost less than 5 pp …`; why there is nothing to say where no benchmark counts.
    """
    if not found.layers:
        return "No benchmark counts yet, so nothing can be said of the layers."
    costly, undecided = found.costly, found.open
    level = capital(measure_of(found.cells[0]).level)
    falls, rises = ("falls", "rises") if found.is_accuracy else ("rises", "falls")
    on = f"{'on average over' if len(found.cells) > 1 else 'on'} {name_benchmarks(found.cells)}"
    sentences = []
    if costly:
        sentences.append(f"{level} {on} {falls} without {_layers(costly, 'or')}.")
    else:
        comma = "," if len(found.cells) > 1 else ""
        sentences.append(f"So far no layer is shown to matter{comma} {on}.")
    if weak := [cell for cell in found.cells if _at_chance(cell)]:
        sentences.append(
            f"On {name_benchmarks(weak)} the intact model itself is not shown to be above "
            "guessing, so that accuracy has nothing to lose there."
        )
    if found.helpful:
        subject = "It" if costly else level
        sentences.append(f"{subject} {rises} without {_layers(found.helpful, 'or')}.")
    if small := found.small:
        subject = f"{len(small)} of {counted(len(found.layers), 'layer')}"
        if len(small) <= min(_NAMED, len(found.layers) // 2):
            subject = f"Only {_layers(small, 'and')}"
        are = "is" if len(small) == 1 else "are"
        sentences.append(f"{subject} {are} shown to cost less than {SMALL_IN_WORDS}.")
    if undecided:
        sentences.append(_undecided(found, len(undecided)))
    falling = {} if costly else found.falling
    if falling:
        named = "; ".join(
            f"{_layers(layers, 'and')} on {where}" for where, layers in _grouped(falling)
        )
        sentences.append(
            f"The log-probability of the right answer varies less: the {FIRST} removals that lower "
            f"it most include {named}."
        )
    sentences += _causes(found, {*costly, *falling})
    if found.missed:
        subject = "layer with the highest cosine score is"
        if len(costly) > 1:
            subject = f"{len(costly)} layers with the highest cosine scores are"
        highest, matter = (listed([*map(str, sorted(of))]) for of in (found.by_cosine, costly))
        sentences.append(f"The {subject} {highest}, not {matter}.")
    return f"{' '.join(sentences)} ({basis(found.cells)}.)"


def basis(cells: Sequence[CellRecord], what: str = "layers") -> str:
    """Say on what something rests that is said of all layers, or all else, of some cells."""
    counts = [*dict.fromkeys(cell.documents for cell in cells)]
    each = " each" if len(cells) > 1 and len(counts) == 1 else ""
    return f"{listed(counts)}{each}; 95 % confidence for all {what} together"


def _at_chance(cell: CellRecord) -> bool:
    low, chance = cell.baseline.low, cell.chance_accuracy
    return low is not None and chance is not None and low <= chance


def _together(
    cells: Sequence[CellRecord],
    layers: Collection[int],
    figure: Callable[[RunRecord], Estimate],
    each: int = 0,
) -> _ByCell:
    """Widen the intervals of one figure of all runs, so that they hold at once.

    `each` is how many statements are made of a cell, where that is more than one a layer.
    """
    runs = [of[layer] for of in [cell.runs_of() for cell in cells] for layer in layers]
    family = max(len(cells) * each, len(runs), 1)
    wide = iter(together([figure(run) for run in runs], [run.n for run in runs], family))
    return {cell.key: {layer: next(wide) for layer in layers} for cell in cells}


def _low(figures: dict[int, Estimate], layer: int) -> float:
    low = figures[layer].low
    return -math.inf if low is None else low


def _causes(found: Claims, named: Collection[int]) -> list[str]:
    """Say of the layers that are named whether the model still speaks without them."""
    broken = [layer for layer in found.broken if layer in named]
    others = [layer for layer in found.costly if layer not in broken]
    if not broken:
        return []
    sentences = [
        f"Without {_layers(broken, 'or')} the model breaks down (every answer becomes unlikely)."
    ]
    if others:
        sentences.append(f"Without {_layers(others, 'or')} it still works but picks wrong answers.")
    return sentences


def _grouped(which: dict[int, list[CellRecord]]) -> list[tuple[str, list[int]]]:
    """Gather the layers that are named for the same benchmarks, those of most benchmarks first."""
    groups = grouped(which, lambda layer: tuple(map(id, which[layer])))
    every = sorted(groups.items(), key=lambda item: (-len(item[0]), item[1]))
    return [(name_benchmarks(which[layers[0]]), sorted(layers)) for _, layers in every]


def _undecided(found: Claims, count: int) -> str:
    count_measured = found.cells[0].n
    alike = all(cell.n == count_measured for cell in found.cells)
    measured = counted(count_measured, "document") if alike else "the documents measured"
    text = f"For {counted(count, 'layer')}, {measured} cannot tell."
    if (settled := found.settled_by()) is None:
        return text
    loss, needed = f"a loss of {100 * settled[0]:g} pp", settled[1]
    documents = f"about {needed:,} documents{' of each benchmark' if found.cells[1:] else ''}"
    if not (lacking := found.lacking(needed)):
        return f"{text} With {documents} in all, {loss} would probably be detected."
    sizes = [f"{cell.benchmark.documents:,} of {name_benchmarks([cell])}" for cell in lacking]
    free = any(fall.value is not None for falls in found.gold.values() for fall in falls.values())
    gold = "the log-probability of the right answer, which is measured already and varies less, or "
    return (
        f"{text} {capital(loss)} would take {documents}, but there are only {listed(sizes)}. "
        f"Cheaper than another benchmark: {gold if free else ''}'until', which asks about these "
        "documents alone."
    )


def _all_at_once(cell: CellRecord, runs: Sequence[RunRecord], family: int) -> list[Estimate]:
    """Find the drops of runs, with intervals that hold for so many statements."""
    drops = [run.drop for run in runs]
    return drops if cell.is_raced else together(drops, [run.n for run in runs], family)


def name_benchmarks(cells: Sequence[CellRecord]) -> str:
    """Name benchmarks, each as shortly as tells it from the others."""
    titles = [cell.benchmark.title for cell in cells]
    return listed(titles if len({*titles}) == len(titles) else benchmark_labels(cells))


def _layers(layers: Sequence[int], joint: str) -> str:
    plural = "s" if len(layers) > 1 and joint == "and" else ""
    return f"layer{plural} {listed([*map(str, layers)], joint)}"
