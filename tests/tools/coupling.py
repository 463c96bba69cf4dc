"""Measure how many samples coupled sampling saves against independent sampling.

    python -m tests.tools.coupling RESULTS

reads the cells with sampled texts in a results folder, judges each text on its own, and prints for
each change the variance of one sample's drop within a document: coupled (of the difference) and
independent (the sum of both models' variances). Their ratio is the ratio of the numbers of samples
that give the same interval, because the variance between documents is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import stored_texts
from tracker.ledger.store import Ledger
from tracker.models.load import load_model
from tracker.models.sources import find_model
from tracker.schema.documents import GeneratedText, Response
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.team.result_files import rebuild_request


def judge_samples(store: CellStore) -> dict[str, np.ndarray]:
    """Return the primary metric of each text by ablation, as `[documents, samples]`."""
    request = rebuild_request(store)
    loaded = load_model(find_model(request.model), device="cpu")
    benchmark = LmEvalBenchmark(request)
    encoder = RequestEncoder(loaded.model, loaded.tokenizer, request.benchmark)
    documents = {d.key: d for d in benchmark.documents(encoder, ALL_DOCUMENTS)}
    metric = store.identity.benchmark.primary_metric
    values: dict[str, list[list[float]]] = {}
    for row in store.read().sort_values(["task", "doc"]).to_dict("records"):
        document = documents[row["task"], row["doc"]]
        prompt, scores = document.prompt, []
        assert prompt is not None
        for text in stored_texts(row):
            generated = GeneratedText(text, early=(text,) * len(prompt.budgets))
            response = Response(0.0, False, 0, (generated,) * prompt.samples)
            scores.append(float(benchmark.outcomes(document, [response])[metric]))
        values.setdefault(row["ablation"], []).append(scores)
    return {name: np.array(scores) for name, scores in values.items()}


def compare_variances(values: dict[str, np.ndarray]) -> Iterator[tuple[str, float, float, float]]:
    """Yield each ablation, its drop, and the coupled and independent variance of one sample."""
    intact = values["baseline"]
    for name, changed in values.items():
        if name != "baseline":
            coupled = (intact - changed).var(axis=1, ddof=1).mean()
            apart = (intact.var(axis=1, ddof=1) + changed.var(axis=1, ddof=1)).mean()
            yield name, float((intact - changed).mean()), float(coupled), float(apart)


def main(results: Path) -> None:
    for store in Ledger(results).cells():
        if "noise" not in store.identity.benchmark.settings:
            continue
        rows = list(compare_variances(judge_samples(store)))
        benchmark = store.identity.benchmark
        lines = [f"{benchmark.title}, {benchmark.settings_text}"]
        for name, drop, coupled, apart in rows:
            ratio = coupled / apart if apart else float("nan")
            lines.append(
                f"{name:12} drop {drop:6.3f}  coupled {coupled:.4f}  apart {apart:.4f}  {ratio:.2f}"
            )
        totals = np.array([row[2:] for row in rows]).sum(axis=0)
        lines.append(f"samples needed, coupled / independent: {totals[0] / totals[1]:.2f}")
        sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
