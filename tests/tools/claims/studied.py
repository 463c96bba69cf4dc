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
from tracker.ledger.shards import write_observations
from tracker.ledger.store import Ledger
from tracker.schema.config import cell_request
from tracker.schema.estimates import Estimate
from tracker.search.report import StrategyResult
from tracker.studies import calibration, savings
from tracker.studies.audit.figures import OBSERVATION_KIND
from tracker.studies.base import Subject, open_study
from tracker.studies.prune import Method, PrunedBenchmark, Prunings, write_answers

from .made_up import BENCHMARKS, LAYERS, draw_scores

RACED_QUESTIONS = ("drop within 5 pp", "top 3", "prune 8 within 1 pp", "sign")
TOKENS = 10.0
STRATEGIES = ("accuracy", "gold_logprob", "cosine_oneshot", "last", "random")
SPARING_STRATEGIES = STRATEGIES[:2]
"""Strategies that remove no layer that matters; where some do, the others remove one of them."""
AMOUNT = "25 %"
PAIRS = 8
"""Of so many first layers every two are removed together."""
_COUNTED = re.compile(r", (\d+) pairs are redundant and (\d+) are sub-additive")
_BETTER = re.compile(r"significantly better than by ([a-z_, ]+)|(\w+) beats (\w+)")
_OPEN = re.compile(r"leaves the most accuracy; it may be ([a-z_, ]+?)\.")
_NEVER = (
    "leaves the most of",
    "significantly worse",
    "relevance depends on the task more",
    "more than in any of the paper's models",
)
"""What is not so, whatever layers matter: proxies but one, and strategies, are alike."""
_OF_NOTHING = ("needs about", "third claim", " more than the sum", " less than the sum")
"""What is not so where no layer matters."""


def study_statements(results: Path, costs: Mapping[int, float], seed: int) -> Iterator[str]:
    """Read the answers of the studies that need no model."""
    generator = np.random.default_rng(seed)
    subjects = _load_subjects(results)
    for subject in subjects:
        _write_random_proxies(subject, generator)
    orders = savings.draw_orders
    with ExitStack() as patches:
        # No sentence names anything by the races, and fewer draws are the same on average.
        for patched, name, value in (
            (savings, "draw_orders", lambda documents: orders(documents)[:2]),
            (calibration, "SAMPLE_PAIRS", 100),
            (calibration, "JACKKNIFE_PAIRS", 25),
            (Prunings, "removed_counts", lambda *_: [1]),  # no search stands behind it
        ):
            patches.enter_context(patch.object(patched, name, value))
        for name in ("calibration", "savings", "audit", "joint"):
            study = open_study(
                name, **({"questions": RACED_QUESTIONS} if name == "savings" else {})
            )
            yield from study.answer(Mock(), subjects).answers
        yield from write_answers(_draw_prunings(costs, generator, subjects[0].record.n))


def _load_subjects(results: Path) -> list[Subject]:
    stores = {store.identity.key: store for store in Ledger(results).cells()}
    subjects = []
    for record in api.ls(results):
        name = record.benchmark.name
        request = cell_request(model="m", benchmark=name, layers=tuple(range(LAYERS)))
        subjects.append(Subject(request, stores[record.key], record))
    return subjects


def _write_random_proxies(subject: Subject, generator: np.random.Generator) -> None:
    """Observe proxies that have nothing to do with what any layer costs."""
    names = ("lens_changes", "kl", "js", "loss_increase", "gate_gradient")
    level = {name: generator.normal(1, 0.3, LAYERS) for name in names}
    extent = subject.request.extent
    for block in subject.store.blocks(extent):
        observations = {
            doc: {
                name: TOKENS * generator.normal(level_mean, 0.3)
                for name, level_mean in level.items()
            }
            | {"tokens": np.array(TOKENS), "predicted": np.array(TOKENS - 1)}
            for doc in subject.store.documents(block, extent)
        }
        write_observations(subject.store.folder, OBSERVATION_KIND, block, observations)


def _draw_prunings(
    costs: Mapping[int, float], generator: np.random.Generator, documents: int
) -> Prunings:
    """Prune by strategies of which two cost nothing, and the others a layer that matters."""
    prunings, worst_layer = (Prunings("made-up", LAYERS), max(costs, default=None, key=costs.get))
    removed_layers = (worst_layer,) if worst_layer is not None else ()
    sets = [(), *(() if name in SPARING_STRATEGIES else removed_layers for name in STRATEGIES)]
    for name in BENCHMARKS:
        gold, scores = draw_scores(generator, sets, costs, documents, 1.0)
        baseline, *pruned_right = (
            (option_scores.argmax(axis=1) == gold) * 1.0 for option_scores in scores
        )
        prunings.benchmarks[name] = PrunedBenchmark(
            Estimate(float(baseline.mean())), documents, "acc"
        )
        for strategy, is_right in zip(STRATEGIES, pruned_right, strict=True):
            paired = PairedOutcomes(baseline, is_right[:, None], np.full(documents, 1 / documents))
            prunings.choices[Method(strategy, AMOUNT), name] = StrategyResult((), (paired,))
    return prunings


def is_false_statement(sentence: str, costs: Mapping[int, float]) -> bool:
    """Check whether a study's sentence is not so, besides the layers that it names."""
    if (candidates := _OPEN.search(sentence)) and candidates[1] != "any of them":
        return not costs or not {*SPARING_STRATEGIES} <= {*re.findall(r"\w+", candidates[1])}
    if better_match := _BETTER.search(sentence):
        worse_names = {*re.findall(r"\w+", better_match[1] or better_match[3])} - {"no", "other"}
        best_name = better_match[2] or SPARING_STRATEGIES[0]
        return bool(worse_names) and (
            not costs
            or best_name not in SPARING_STRATEGIES
            or not worse_names.isdisjoint(SPARING_STRATEGIES)
        )
    if any(phrase in sentence for phrase in (*_NEVER, *(() if costs else _OF_NOTHING))):
        return "not known" not in sentence and "neither significantly" not in sentence
    if "orders the layers best" in sentence:
        return "gold log-prob drop" not in sentence
    if counts := _COUNTED.search(sentence):
        return sum(map(int, counts.groups())) > len(costs) * (len(costs) - 1) / 2
    if "by other figures" in sentence and not costs:
        return "gold" in sentence.partition("by other figures")[2]
    return False
