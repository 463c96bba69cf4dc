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

FINE, REFUSED, TRACEBACK, SILENT = "fine", "refused well", "tracebacks", "silent differences"
LOST, DOUBLED = "lost", "doubled"
OUTCOMES = (FINE, REFUSED, TRACEBACK, SILENT, LOST, DOUBLED)
LONGEST = 3000
"""Characters that a refusal may have."""


@dataclass
class Tried:
    """Outcomes of many attempts of one kind.

    Attributes:
        what: The kind.
        counts: How often each outcome came.
        finds: What should not have been, in words.
    """

    what: str
    counts: Counter[str] = field(default_factory=Counter)
    finds: list[str] = field(default_factory=list)

    def add(self, outcome: str, find: str = "") -> None:
        """Count one attempt."""
        self.counts[outcome] += 1
        if find:
            self.finds.append(find)


def every(strategy: st.SearchStrategy[Any], count: int, start: int) -> Iterator[Any]:
    """Draw so many examples, the same ones for the same seed."""
    found: list[Any] = []

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
        found.append(example)

    draw()
    yield from found[:count]


def command(arguments: list[str], tried: Tried, about: str) -> None:
    """Run a command in this process, and judge how it ends."""
    found = CliRunner().invoke(main, arguments)
    said = f"{about}\n{arguments}\n{found.output[-600:]}"
    crashed = found.exception is not None and not isinstance(found.exception, SystemExit)
    if crashed or "Traceback" in found.output or "this is a bug of tracker's" in found.output:
        tried.add(TRACEBACK, f"{said}\n{found.exception!r}")
    elif found.exit_code == 0:
        tried.add(FINE)
    elif found.exit_code in (1, 2) and 0 < len(found.output) < LONGEST:
        tried.add(REFUSED)
    else:
        tried.add(TRACEBACK, f"exit code {found.exit_code}, {len(found.output)} characters: {said}")


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Work in a folder that is thrown away."""
    before = Path.cwd()
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def experiments(model: Path, count: int, start: int, room: Path) -> Tried:
    """Validate experiment files."""
    tried = Tried("experiment files")
    with inside(room / "experiments") as folder:
        for content in every(drawn.experiment_texts(str(model)), count, start):
            (folder / "x.yaml").write_bytes(content)
            command(["validate", "x.yaml"], tried, content[:800].decode(errors="replace"))
    return tried


def command_lines(model: Path, count: int, start: int, room: Path) -> Tried:
    """Type commands."""
    tried = Tried("command lines")
    whole = faults.make(room / "whole")
    with inside(room / "typing") as folder:
        known = [str(whole), "x.yaml", "results", str(model)]
        for line in every(drawn.command_lines(known), count, start):
            drawn_experiment = drawn.experiment(str(model))
            (folder / "x.yaml").write_text(drawn.yaml.safe_dump(drawn_experiment))
            command(line, tried, "")
    return tried


def configurations(model: Path, count: int, start: int, room: Path) -> Tried:
    """Plan with, and measure, a model whose configuration was spoilt."""
    tried = Tried("configurations")
    import json

    whole = json.loads((model / "config.json").read_text())
    with inside(room / "configurations") as folder:
        shutil.copytree(model, folder / "model")
        (folder / "x.yaml").write_text(drawn.yaml.safe_dump(drawn.experiment("./model")))
        for number, text in enumerate(every(drawn.configurations(whole), count, start)):
            (folder / "model" / "config.json").write_text(text, errors="replace")
            arguments = ["run", "x.yaml", "--track", "none", "--results", f"r{number}"]
            command(["plan", "x.yaml", "--gflops", "1"] if number % 2 else arguments, tried, text)
            shutil.rmtree(folder / f"r{number}", ignore_errors=True)
    return tried


def ledgers(flips: int, files: int, start: int, room: Path) -> tuple[Tried, Tried]:
    """Flip bits of a results folder, and replace its files."""
    whole = faults.make(room / "ledger")
    truth, _ = faults.seen(whole)
    draw = random.Random(start)
    paths = [path.relative_to(whole) for path in faults.files(whole)]
    shards = [path for path in paths if path.suffix == ".parquet"]

    def attempt(tried: Tried, hit: Path, harm: Callable[[Path], object]) -> None:
        copy = Path(shutil.copytree(whole, room / "copy"))
        harm(copy / hit)
        if draw.random() < 0.5:  # what was derived before may not hide it
            shutil.rmtree(next(copy.glob("cells/*/derived")), ignore_errors=True)
        try:
            found = faults.silent(copy, truth, hit)
        except Exception as error:  # noqa: BLE001  whatever it is, it is a find
            tried.add(TRACEBACK, f"{hit}: {error!r}")
        else:
            tried.add(SILENT if found else REFUSED, found)
        shutil.rmtree(copy)

    bits, replaced = Tried("flipped bits"), Tried("spoilt files")
    for _ in range(flips):
        hit = draw.choice(shards if draw.random() < 0.7 else paths)
        place = draw.randrange(8 * (whole / hit).stat().st_size)
        attempt(bits, hit, lambda path, place=place: faults.flip(path, place))
    for _ in range(files):
        attempt(replaced, draw.choice(paths), faults.FAULTS[draw.choice(sorted(faults.FAULTS))])
    return bits, replaced


def killed(process: subprocess.Popen[bytes], after: float) -> bool:
    """Kill a process after some seconds; whether it was still at it."""
    time.sleep(after)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def kept(results: Path, before: Mapping[Path, bytes]) -> tuple[str, str]:
    """Classify what happened to the shards of a results folder during an attempt."""
    after = shards(results)
    if any(after.get(path) != content for path, content in before.items()):
        return LOST, f"{results}: what was there is gone or changed"
    places = ["cell", "task", "doc", "ablation"]
    tables = [pd.read_parquet(path).assign(cell=path.parents[1].name) for path in after]
    if tables and pd.concat(tables).duplicated(places).any():
        return DOUBLED, f"{results}: doubled"
    return FINE, ""


def shards(results: Path) -> dict[Path, bytes]:
    """Read all files of outcomes."""
    return {path: path.read_bytes() for path in results.glob("cells/*/shards/*.parquet")}


def outcomes(results: Path) -> pd.DataFrame:
    """Read all outcomes, as text, but for who measured them."""
    stores = Ledger.existing(results).cells()
    frame = pd.concat(store.read().assign(cell=store.identity.key) for store in stores)
    places = ["cell", "task", "doc", "ablation"]
    return frame.drop(columns="provenance").sort_values(places, ignore_index=True).map(str)
