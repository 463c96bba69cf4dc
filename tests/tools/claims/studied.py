"""Run studies on made-up results, without a model, and find false statements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np

from tracker import api
from tracker.analysis.paired import PairedOutcomes
from tracker.core.config import cell_request
from tracker.core.estimates import Estimate
from tracker.ledger.shards import write_observations
from tracker.ledger.store import Ledger
from tracker.search.report import Choices
from tracker.studies import calibration, savings
from tracker.studies.audit.figures import KIND
from tracker.studies.base import Subject, open_study
from tracker.studies.prune import PrunedBenchmark, Prunings, Way, answers_of

from .made_up import BENCHMARKS, LAYERS, draw_scores

ASKED = ("drop within 5 pp", "top 3", "prune 8 within 1 pp", "sign")
TOKENS = 10.0
STRATEGIES = ("accuracy", "gold_logprob", "cosine_oneshot", "last", "random")
SPARED = STRATEGIES[:2]
"""Strategies that remove no layer that matters; where some do, the others remove one of them."""
AMOUNT = "25 %"
PAIRS = 8
"""Of so many first layers every two are removed together."""
_COUNTED = re.compile(r": (\d+) redundant and (\d+) sub-additive pairs")
_BETTER = re.compile(r"significantly better than ([a-z_, ]+)|(\w+) beats (\w+)")
_OPEN = re.compile(r"leaves the most is open, it may be ([a-z_, ]+?);")
_NEVER = (
    "leaves the most of",
    "significantly worse",
    "relevance depends on the task more",
    "more than in any of the paper's models",
)
"""What is not so, whatever layers matter: proxies but one, and strategies, are alike."""
_OF_NOTHING = ("needs about", "third claim", " more together", " less together")
"""What is not so where no layer matters."""


def said_by_studies(results: Path, costs: Mapping[int, float], seed: int) -> Iterator[str]:
    """Read the answers of the studies that need no model."""
    dice = np.random.default_rng(seed)
    subjects = _subjects(results)
    for subject in subjects:
        _observe(subject, dice)
    orders = savings.orders_of
    with ExitStack() as quick:
        # No sentence names anything by the races, and fewer draws are the same on average.
        for place, name, value in (
            (savings, "orders_of", lambda documents: orders(documents)[:2]),
            (calibration, "SAMPLE_PAIRS", 100),
            (calibration, "JACKKNIFE_PAIRS", 25),
            (Prunings, "removed", lambda *_: [1]),  # no search stands behind it
        ):
            quick.enter_context(patch.object(place, name, value))
        for name in ("calibration", "savings", "audit", "joint"):
            study = open_study(name, **({"questions": ASKED} if name == "savings" else {}))
            yield from study.answer(Mock(), subjects).answers
        yield from answers_of(_pruned(costs, dice, subjects[0].record.n))


def _subjects(results: Path) -> list[Subject]:
    stores = {store.identity.key: store for store in Ledger(results).cells()}
    found = []
    for record in api.ls(results):
        name = record.benchmark.name
        request = cell_request(model="m", benchmark=name, layers=tuple(range(LAYERS)))
        found.append(Subject(request, stores[record.key], record))
    return found


def _observe(subject: Subject, dice: np.random.Generator) -> None:
    """Observe proxies that have nothing to do with what any layer costs."""
    names = ("lens_changes", "kl", "js", "loss_increase", "gate_gradient")
    level = {name: dice.normal(1, 0.3, LAYERS) for name in names}
    extent = subject.request.extent
    for block in subject.store.blocks(extent):
        found = {
            doc: {name: TOKENS * dice.normal(at, 0.3) for name, at in level.items()}
            | {"tokens": np.array(TOKENS), "predicted": np.array(TOKENS - 1)}
            for doc in subject.store.documents(block, extent)
        }
        write_observations(subject.store.folder, KIND, block, found)


def _pruned(costs: Mapping[int, float], dice: np.random.Generator, documents: int) -> Prunings:
    """Prune by strategies of which two cost nothing, and the others a layer that matters."""
    group, worst = Prunings("made-up", LAYERS), max(costs, default=None, key=costs.get)
    lost = (worst,) if worst is not None else ()
    sets = [(), *(() if name in SPARED else lost for name in STRATEGIES)]
    for name in BENCHMARKS:
        gold, scores = draw_scores(dice, sets, costs, documents, 1.0)
        before, *after = ((each.argmax(axis=1) == gold) * 1.0 for each in scores)
        group.benchmarks[name] = PrunedBenchmark(Estimate(float(before.mean())), documents, "acc")
        for strategy, right in zip(STRATEGIES, after, strict=True):
            answered = PairedOutcomes(before, right[:, None], np.full(documents, 1 / documents))
            group.found[Way(strategy, AMOUNT), name] = Choices((), (answered,))
    return group


def is_false_of(sentence: str, costs: Mapping[int, float]) -> bool:
    """Check whether a study's sentence is not so, besides the layers that it names."""
    if (candidates := _OPEN.search(sentence)) and candidates[1] != "each of them":
        return not costs or not {*SPARED} <= {*re.findall(r"\w+", candidates[1])}
    if better := _BETTER.search(sentence):
        worse = {*re.findall(r"\w+", better[1] or better[3])} - {"no", "other"}
        best = better[2] or SPARED[0]
        return bool(worse) and (not costs or best not in SPARED or not worse.isdisjoint(SPARED))
    if any(words in sentence for words in (*_NEVER, *(() if costs else _OF_NOTHING))):
        return "is open" not in sentence and "neither surely" not in sentence
    if "orders the layers best" in sentence:
        return "gold log-prob drop" not in sentence
    if counts := _COUNTED.search(sentence):
        return sum(map(int, counts.groups())) > len(costs) * (len(costs) - 1) / 2
    if "by other figures" in sentence and not costs:
        return "gold" in sentence.partition("by other figures")[2]
    return False
