"""Try random input, and classify the outcomes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.helpers import faults
from tests.tools.fuzz import drawn
from tracker.cli.commands import main
from tracker.ledger.store import Ledger

FINE_OUTCOME, REFUSED, TRACEBACK, SILENT = (
    "fine",
    "refused well",
    "tracebacks",
    "silent differences",
)
LOST, DOUBLED = "lost", "doubled"
OUTCOMES = (FINE_OUTCOME, REFUSED, TRACEBACK, SILENT, LOST, DOUBLED)
MAX_MESSAGE = 3000
"""Characters that a refusal may have."""


@dataclass
class FuzzTrial:
    """Outcomes of many attempts of one kind.

    Attributes:
        topic: The kind.
        counts: How often each outcome came.
        finds: What should not have been, in words.
    """

    topic: str
    counts: Counter[str] = field(default_factory=Counter)
    finds: list[str] = field(default_factory=list)

    def add(self, outcome: str, find: str = "") -> None:
        """Count one attempt."""
        self.counts[outcome] += 1
        if find:
            self.finds.append(find)


def draw_examples(strategy: st.SearchStrategy[Any], count: int, start: int) -> Iterator[Any]:
    """Draw so many examples, the same ones for the same seed."""
    examples: list[Any] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(example: Any) -> None:
        examples.append(example)

    draw()
    yield from examples[:count]


def judge_command(arguments: list[str], trial: FuzzTrial, description: str) -> None:
    """Run a command in this process, and judge how it ends."""
    result = CliRunner().invoke(main, arguments)
    message = f"{description}\n{arguments}\n{result.output[-600:]}"
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    if crashed or "Traceback" in result.output or "internal error" in result.output:
        trial.add(TRACEBACK, f"{message}\n{result.exception!r}")
    elif result.exit_code == 0:
        trial.add(FINE_OUTCOME)
    elif result.exit_code in (1, 2) and 0 < len(result.output) < MAX_MESSAGE:
        trial.add(REFUSED)
    else:
        trial.add(
            TRACEBACK, f"exit code {result.exit_code}, {len(result.output)} characters: {message}"
        )


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Work in a folder that is thrown away."""
    old_folder = Path.cwd()
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(old_folder)
        shutil.rmtree(folder, ignore_errors=True)


def experiments(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Validate experiment files."""
    trial = FuzzTrial("experiment files")
    with working_in(scratch / "experiments") as folder:
        for content in draw_examples(drawn.experiment_texts(str(model)), count, start):
            (folder / "x.yaml").write_bytes(content)
            judge_command(["validate", "x.yaml"], trial, content[:800].decode(errors="replace"))
    return trial


def command_lines(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Type commands."""
    trial = FuzzTrial("command lines")
    results_folder = faults.make_results(scratch / "whole")
    with working_in(scratch / "typing") as folder:
        good_arguments = [str(results_folder), "x.yaml", "results", str(model)]
        for line in draw_examples(drawn.command_lines(good_arguments), count, start):
            drawn_experiment = drawn.valid_experiment(str(model))
            (folder / "x.yaml").write_text(drawn.yaml.safe_dump(drawn_experiment))
            judge_command(line, trial, "")
    return trial


def configurations(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Plan with, and measure, a model whose configuration was spoilt."""
    trial = FuzzTrial("configurations")
    import json

    original = json.loads((model / "config.json").read_text())
    with working_in(scratch / "configurations") as folder:
        shutil.copytree(model, folder / "model")
        (folder / "x.yaml").write_text(drawn.yaml.safe_dump(drawn.valid_experiment("./model")))
        for number, text in enumerate(draw_examples(drawn.configurations(original), count, start)):
            (folder / "model" / "config.json").write_text(text, errors="replace")
            arguments = ["run", "x.yaml", "--track", "none", "--results", f"r{number}"]
            judge_command(
                ["plan", "x.yaml", "--gflops", "1"] if number % 2 else arguments, trial, text
            )
            shutil.rmtree(folder / f"r{number}", ignore_errors=True)
    return trial


def try_ledgers(flips: int, files: int, start: int, scratch: Path) -> tuple[FuzzTrial, FuzzTrial]:
    """Flip bits of a results folder, and replace its files."""
    results_folder = faults.make_results(scratch / "ledger")
    truth, _ = faults.show_results(results_folder)
    generator = random.Random(start)
    paths = [path.relative_to(results_folder) for path in faults.damageable_files(results_folder)]
    shards = [path for path in paths if path.suffix == ".parquet"]

    def attempt(trial: FuzzTrial, path: Path, harm: Callable[[Path], object]) -> None:
        copy = Path(shutil.copytree(results_folder, scratch / "copy"))
        harm(copy / path)
        if generator.random() < 0.5:  # what was derived before may not hide it
            shutil.rmtree(next(copy.glob("cells/*/derived")), ignore_errors=True)
        try:
            difference = faults.silent_difference(copy, truth, path)
        except Exception as error:  # noqa: BLE001  whatever it is, it is a find
            trial.add(TRACEBACK, f"{path}: {error!r}")
        else:
            trial.add(SILENT if difference else REFUSED, difference)
        shutil.rmtree(copy)

    bits, replaced = FuzzTrial("flipped bits"), FuzzTrial("spoilt files")
    for _ in range(flips):
        hit = generator.choice(shards if generator.random() < 0.7 else paths)
        bit = generator.randrange(8 * (results_folder / hit).stat().st_size)
        attempt(bits, hit, lambda path, bit=bit: faults.flip_bit(path, bit))
    for _ in range(files):
        attempt(
            replaced,
            generator.choice(paths),
            faults.FAULTS[generator.choice(sorted(faults.FAULTS))],
        )
    return bits, replaced


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill a process after some seconds; whether it was still at it."""
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def judge_shards(results: Path, shards_before: Mapping[Path, bytes]) -> tuple[str, str]:
    """Classify what happened to the shards of a results folder during an attempt."""
    shards_after = read_shards(results)
    if any(shards_after.get(path) != content for path, content in shards_before.items()):
        return LOST, f"{results}: what was there is gone or changed"
    key_columns = ["cell", "task", "doc", "ablation"]
    tables = [pd.read_parquet(path).assign(cell=path.parents[1].name) for path in shards_after]
    if tables and pd.concat(tables).duplicated(key_columns).any():
        return DOUBLED, f"{results}: doubled"
    return FINE_OUTCOME, ""


def read_shards(results: Path) -> dict[Path, bytes]:
    """Read all files of outcomes."""
    return {path: path.read_bytes() for path in results.glob("cells/*/shards/*.parquet")}


def read_all_outcomes(results: Path) -> pd.DataFrame:
    """Read all outcomes, as text, but for who measured them."""
    stores = Ledger.open_existing(results).cells()
    frame = pd.concat(store.read().assign(cell=store.identity.key) for store in stores)
    key_columns = ["cell", "task", "doc", "ablation"]
    return frame.drop(columns="provenance").sort_values(key_columns, ignore_index=True).map(str)
