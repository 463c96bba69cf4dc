"""Compares everything that is shown of stored results folders with committed texts.

`folders/NAME.tar.xz` holds a results folder; `shown/NAME/KIND.txt` is what is shown of it.
`pytest tests/golden --update-golden` rewrites the texts; the changes in them are to be read.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, redirect_stdout
from difflib import unified_diff
from functools import partial
from html.parser import HTMLParser
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.conftest import cli
from tests.helpers.wandb_double import WandbDouble
from tests.tracking.wandb_client import Client
from tracker import api
from tracker.cli.printing import print_finding, print_results
from tracker.ledger.store import Ledger
from tracker.schema.distribution import __version__
from tracker.tracking.base import Isolated
from tracker.tracking.runs import RunSelection

FOLDERS = Path(__file__).with_name("folders")
SHOWN = Path(__file__).with_name("shown")
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in FOLDERS.glob("*.tar.xz"))
RESULTS = "results"
DIGITS = 5
"""Significant digits of figures: processors differ in the last ones."""
WORDS = 72
"""Characters of a cell of a frame; documents' texts are longer."""
DEFINITIONS, DEFINED_IN = "## Definitions and formulas", "demo"
"""The end of each page, which is compared in one folder."""
Shown = Iterator[str]


def extract_folder(name: str, folder: Path) -> Path:
    """Unpack a folder as `results` of another one."""
    with tarfile.open(FOLDERS / f"{name}.tar.xz") as archive:
        archive.extractall(folder / RESULTS, filter="data")
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Callable[[str], Path]:
    """Unpack each folder once for all tests that do not change it."""
    folders: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name not in folders:
            folders[name] = extract_folder(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return unpack


@pytest.fixture
def compare(request, tmp_path) -> Callable[..., None]:
    """Compare a text with the committed one, or rewrite that."""

    def compared(name: str, kind: str, lines: Iterator[str]) -> None:
        path = SHOWN / name / f"{kind}.txt"
        text = normalise("\n".join(lines)) + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if text != expected:
            files = (str(path.relative_to(SHOWN)), "shown now")
            diff = unified_diff(expected.splitlines(), text.splitlines(), *files, "", "", 2, "")
            pytest.fail("\n".join(diff), pytrace=False)

    return compared


FIGURE = re.compile(
    r"(?<![\w.])-?\d+\.\d{5,}(?:e[+-]?\d+)?(?![\w.])|(?<![\w.])-?\d+(?:\.\d+)?e-\d+"
)
PLACES = (
    (re.compile(r"[^\s'\"=(:]*/(?:pytest-of-[^/\s]+|pytest-\d+)/[^\s'\",)]*"), "PATH"),
    (re.compile(rf"\btracker {re.escape(__version__)}"), "tracker VERSION"),
    (re.compile(r"(?<=runs/)[0-9a-f]{32}\b"), "RUN"),
    (re.compile(r"127\.0\.0\.1:\d+"), "SERVER"),
    (re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b"), r"\1"),
)


def normalise(text: str) -> str:
    """Round figures with many digits; replace paths and ports of this machine."""
    for pattern, word in PLACES:
        text = pattern.sub(word, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def format_figure(value: float) -> str:
    """Format a figure; tiny ones become zero."""
    if math.isnan(value) or math.isinf(value):
        return str(value)
    return f"{0.0 if abs(value) < 1e-9 else value:.{DIGITS}g}"


def cell(value: Any) -> str:
    """Write an entry of a frame or a table."""
    if isinstance(value, float):
        return format_figure(value)
    text = " ".join(round_figures(str(value)).split())
    return text if len(text) <= WORDS else f"{text[:WORDS]}…"


def round_figures(text: str) -> str:
    """Round the figures in a text."""
    return FIGURE.sub(lambda match: format_figure(float(match[0])), text)


def spread_rows(rows: Sequence[Any], count: int) -> list[Any]:
    """Pick a number of rows at equal distances, with the first and the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


class PageText(HTMLParser):
    """Reads a page: a line a block; rows of tables with their reasons; packed scripts apart."""

    HEADS = ("h1", "h2", "h3", "h4")
    BLOCKS = (*HEADS, "p", "li", "caption", "tr", "figcaption", "summary", "dt", "dd", "pre", "div")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.scripts: dict[str, str] = {}
        self._line: list[str] = []
        self._within: str | None = None
        self._reason = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("style", "script"):
            self._within = attributes.get("id") or tag
        if tag in self.BLOCKS:
            self.end_line(f"{'#' * int(tag[1])} " if tag in self.HEADS else "")
        if tag in ("td", "th"):
            self._line.append(" | ")
        if title := attributes.get("title"):
            self._reason = f" ({title})"
        if tag == "a" and not (attributes.get("href") or "").startswith("#"):
            self._line.append(f"<{attributes.get('href')}> ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script"):
            self._within = None
        if self._reason:
            self._line.append(self._reason)
            self._reason = ""
        if tag in self.BLOCKS:
            self.end_line()

    def handle_data(self, data: str) -> None:
        if self._within is not None:
            self.scripts[self._within] = data
        else:
            self._line.append(data)

    def end_line(self, begin: str = "") -> None:
        """End a line, and begin another."""
        text = " ".join("".join(self._line).split())
        if text.strip("# |"):
            self.lines.append(text)
        self._line = [begin]


def unpack_script(text: str) -> str:
    """Unpack the data of a page's script."""
    return gzip.decompress(base64.b64decode(text)).decode()


CHART_TEXTS = ("text", "name", "hovertext", "ticktext", "hovertemplate", "texttemplate")


def chart_texts(value: Any, key: str = "") -> Iterator[str]:
    """Yield the titles, names, annotations and hover texts of a chart."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from chart_texts(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from chart_texts(entry, key)
    elif isinstance(value, str) and key in CHART_TEXTS and value.strip():
        yield value.replace("\n", " ")


def page(folder: Path) -> Shown:
    """Read the page as text, with the texts of its charts."""
    assert cli("report", RESULTS, "--output", "page.html").exit_code == 0
    parser = PageText()
    parser.feed(Path("page.html").read_text(encoding="utf-8"))
    lines = [round_figures(line) for line in parser.lines]
    end = lines.index(DEFINITIONS) if folder.name.rstrip("0123456789") != DEFINED_IN else len(lines)
    yield from lines[:end]
    seen: set[str] = set()
    for name, script in parser.scripts.items():
        if name == "charts":
            for title, drawn in json.loads(unpack_script(script))["figures"].items():
                yield f"# chart {title}"
                texts = dict.fromkeys(map(round_figures, chart_texts(drawn)))
                yield from (text for text in texts if text not in seen)
                seen |= {text for text in texts if len(text) > WORDS}
        else:
            yield f"# script {name}"


def terminal(folder: Path) -> Shown:
    """Print the output of commands and runs."""
    commands = (["ls", RESULTS], ["leaderboard", RESULTS], ["check", RESULTS])
    for command in (*commands, ["report", RESULTS, "--output", "page.html"]):
        result = cli(*command)
        yield f"$ tracker {' '.join(command)}  → {result.exit_code}"
        yield "\n".join(line for line in result.output.splitlines() if "━" not in line)
    contents = Ledger(Path(RESULTS)).contents()
    cells = api.load(RESULTS).cells
    for title, print_text in (
        ("what was measured", partial(print_results, cells)),
        *((record.name, partial(print_finding, record)) for record in contents.findings),
    ):
        yield f"# printed: {title}"
        with redirect_stdout(StringIO()) as printed:
            print_text()
        yield printed.getvalue()


def text_file(form: str) -> Callable[[Path], Shown]:
    """Return a function that writes a report in a format and reads it."""

    def shown(folder: Path) -> Shown:
        assert cli("report", RESULTS, "--format", form, "--output", f"report.{form}").exit_code == 0
        yield round_figures(Path(f"report.{form}").read_text(encoding="utf-8"))

    return shown


def csv(folder: Path) -> Shown:
    """Write the CSV files: which they are, their heads, and some rows."""
    assert cli("report", RESULTS, "--format", "csv", "--output", "csv").exit_code == 0
    for path in sorted(Path("csv").rglob("*.csv")):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        yield f"# {path.name}: {len(frame)} rows"
        yield ",".join(frame.columns)
        yield from (",".join(map(cell, row)) for row in spread_rows(frame.values.tolist(), 3))


def frames(folder: Path) -> Shown:
    """List the frames that notebooks read, a column a line; and the answers."""
    results = api.load(RESULTS)
    yield results.answer
    yield str(results)
    for name in ("layers", "correlations", "documents"):
        frame = getattr(results, name)
        yield f"# {name}: {len(frame)} rows"
        shown = frame if name != "documents" else frame.iloc[spread_rows(range(len(frame)), 6)]
        for column in frame.columns:
            values = [cell(value) for value in shown[column]]
            values = values if len(set(values)) > 1 else [*dict.fromkeys(values), "in all"]
            kind = "text" if is_text(frame[column]) else frame[column].dtype
            yield f"{column} ({kind}): {'; '.join(values)}"


def is_text(column: pd.Series[Any]) -> bool:
    """Return whether a column has texts; versions of pandas keep them in different ways."""
    return column.dtype == object or isinstance(column.dtype, pd.StringDtype)


KINDS: dict[str, Callable[[Path], Shown]] = {
    "page": page,
    "terminal": terminal,
    "csv": csv,
    "markdown": text_file("md"),
    "latex": text_file("tex"),
    "frames": frames,
}


def list_fields(head: str, values: Mapping[str, Any]) -> Shown:
    """List names with their values, one per line."""
    for name, value in sorted(values.items()):
        if name == "tracker":
            yield from list_fields(f"{head} {name}", value)
        elif isinstance(value, Mapping):
            inner = ", ".join(f"{n}: {format_value(value[n])}" for n in sorted(value))
            yield f"  {head} {name}: {inner}"
        else:
            yield f"  {head} {name}: {'DIGEST' if name in DIGESTS else format_value(value)}"


DIGESTS = ("digest", "tracker.digest", "tracker.logged_model")
"""What follows from the last digits of figures, or is drawn."""


def format_value(value: Any) -> str:
    """Write a value whole, on one line, with rounded figures."""
    text = format_figure(value) if isinstance(value, float) else round_figures(str(value))
    return text.replace("\n", "⏎")


def format_curve(history: Iterable[tuple[int, float]]) -> str:
    """Write a curve."""
    return "; ".join(f"{step}: {format_figure(value)}" for step, value in history)


def choose_runs(keys: Sequence[str], count: int) -> list[str]:
    """Choose the runs of cells and intact models, and a number of others."""
    suffixes = ("/cell", "/baseline")
    others = spread_rows([key for key in sorted(keys) if not key.endswith(suffixes)], count)
    return [key for key in sorted(keys) if key.endswith(suffixes) or key in others]


def sync_folder(target: str, runs: RunSelection) -> Shown:
    """Publish the folder, and list the published runs and the errors."""
    result = api.sync(target, results=RESULTS, runs=runs)
    yield from (f"published: {title}" for title in result.published)
    yield from (f"failed: {title}: {format_value(why)}" for title, why in result.failed.items())
    yield from (f"note: {note}" for note in result.notes)


def mlflow(folder: Path, name: str) -> Shown:
    """Publish to MLflow's SQLite file, and read the runs with its client."""
    yield from sync_folder("mlflow:golden", "all")
    client = MlflowClient(f"sqlite:///{folder / RESULTS / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("golden")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in runs}
    keys = {run.data.tags["tracker.run_key"]: run for run in runs}
    assert len(keys) == len(runs)
    yield from list_runs({key: run.info.run_name for key, run in keys.items()})
    for key in choose_runs([*keys], 4):
        run = keys[key]
        yield f"# {key}: {run.info.run_name} ({run.info.status})"
        tags = {n: t for n, t in run.data.tags.items() if not n.startswith(USERS)}
        if parent := tags.get("mlflow.parentRunId"):
            tags["mlflow.parentRunId"] = names[parent]
        yield from list_fields("param", run.data.params)
        yield from list_fields("tag", tags)
        for name in sorted(run.data.metrics):
            history = client.get_metric_history(run.info.run_id, name)
            yield f"  metric {name}: {format_curve(sorted((p.step, p.value) for p in history))}"
        yield from (f"  artifact {path}" for path in list_artifacts(client, run.info.run_id))


def list_artifacts(client: MlflowClient, run: str, folder: str | None = None) -> Iterator[str]:
    """List a run's artifacts."""
    for item in client.list_artifacts(run, folder):
        yield from list_artifacts(client, run, item.path) if item.is_dir else (item.path,)


def list_runs(names: Mapping[str, str]) -> Shown:
    """List all runs."""
    yield f"# {len(names)} runs"
    yield from (f"{key}: {names[key]}" for key in sorted(names))


def trackio(folder: Path, name: str) -> Shown:
    """Publish to Trackio's folder, and read the runs with its API."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        yield from sync_folder("trackio:golden", "all")
        with closing(Isolated("Trackio", "tests.tracking.trackio_reader:TrackioReader")) as reader:
            runs = {run["config"]["tracker"]["run_key"]: run for run in reader.runs("golden")}
    yield from list_runs({key: run["name"] for key, run in runs.items()})
    for key in choose_runs([*runs], 2):
        run = runs[key]
        yield f"# {key}: {run['name']}"
        config = {name: value for name, value in run["config"].items() if name not in OWN}
        yield from list_fields("config", config)
        yield from list_curves(run["logs"], "step")


USERS = ("mlflow.user", "mlflow.source")
OWN = ("_Created", "_Username", "_wandb")
"""What an SDK says of itself and its user."""


def list_curves(rows: Sequence[Mapping[str, Any]], step: str) -> Shown:
    """List the logged curves and tables."""
    names = sorted({name for row in rows for name in row} - {step})
    for name in (name for name in names if not name.startswith("_")):
        logged = [(row.get(step, 0), row[name]) for row in rows if name in row]
        if isinstance(logged[0][1], int | float):
            yield f"  metric {name}: {format_curve(spread_rows(logged, 2))}"
        else:
            yield f"  logged {name}: {logged_kind(logged[0][1])}"


def logged_kind(value: Mapping[str, Any]) -> str:
    """Describe a table or a chart, whose content is compared elsewhere."""
    kind = value.get("_type", "")
    table = value.get("_value")
    if not isinstance(table, list):
        return kind
    return f"{kind} {len(table)} rows: {', '.join(table[0] if table else ())}"


def wandb(folder: Path, name: str) -> Shown:
    """Publish to a double of W&B's server, and list its runs and files."""
    with WandbDouble() as double, pytest.MonkeyPatch.context() as patch:
        client = folder / "client"
        client.mkdir()
        Client(double, client).lend(patch)
        yield from sync_folder("wandb:team/golden", "all" if name in RUN_BY_RUN else "cells")
    assert double.refused == []
    project = double.projects["team", "golden"]
    runs = {run.values["tracker"]["run_key"]: run for run in project.runs.values()}
    yield from list_runs({key: run.name for key, run in runs.items()})
    for key in choose_runs([*runs], 2):
        run = runs[key]
        yield f"# {key}: {run.name} ({run.state}, {run.group}, {run.job_type})"
        yield f"  tags {', '.join(run.tags)}"
        yield f"  notes {format_value(run.notes)}"
        yield from list_fields("config", run.values)
        summary = {n: value for n, value in run.summary.items() if not n.startswith("_")}
        yield from list_fields("summary", {n: v for n, v in summary.items() if not is_object(v)})
        yield from list_curves(run.history, "layer")
        yield from (f"  file {path}" for path in sorted(map(drop_digest, run.files)))
        yield from (f"  used {name}" for name in run.used_artifacts)
    for (kind, name), collection in sorted(project.artifacts.items()):
        for version in collection.versions:
            yield f"# artifact {kind} {name}: {', '.join(sorted(version.aliases))}"
            yield from (f"  file {path}" for path in sorted(version.files))


def is_object(value: Any) -> bool:
    """Return whether it is a table, a chart or a file."""
    return isinstance(value, Mapping) and "_type" in value


def drop_digest(path: str) -> str:
    """Leave a digest and a step out of the name of a file."""
    return re.sub(r"_\d+_[0-9a-f]{20}", "", path)


RUN_BY_RUN = ("experts",)
"""Folders whose runs W&B gets one by one, which takes half a second each."""


def samples(folder: Path, name: str) -> Shown:
    """Write lm-eval's files of the intact model and of the runs at a layer."""
    result = cli("log-samples", "--results", RESULTS, "--output", "samples", "--layer", "1")
    yield from (line for line in result.output.splitlines() if "━" not in line)
    for path in sorted(Path("samples").rglob("*.json*")):
        lines = path.read_text(encoding="utf-8").splitlines()
        name = drop_date(str(path))
        if path.suffix == ".jsonl":
            yield f"# {name}: {len(lines)} lines"
            yield from list_fields("sample", json.loads(lines[0]))
        else:
            yield f"# {name}"
            content = json.loads("\n".join(lines))
            lasting = {n: v for n, v in content.items() if n not in OF_THE_DAY}
            yield from list_fields("results", lasting)


OF_THE_DAY = (
    *("date", "start_time", "end_time", "lm_eval_version", "transformers_version"),
    "configs",  # where lm-eval is installed
)
"""What lm-eval's files say of when, where and with what they were written."""


def drop_date(path: str) -> str:
    """Leave the time out of the name of a file."""
    return re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+", "_DATE", path)


def damaged(folder: Path, name: str) -> Shown:
    """Truncate a shard, and print the output of commands."""
    shard = sorted(Path(RESULTS).glob("cells/*/shards/*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    yield from terminal(folder)


def published(folder: Path, name: str) -> Shown:
    """Publish the page to MLflow, and read the run."""
    result = cli("report", RESULTS, "--publish", "mlflow:golden", "--output", "page.html")
    yield result.output
    client = MlflowClient(f"sqlite:///{folder / RESULTS / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("golden")
    for run in client.search_runs([experiment.experiment_id]):
        yield f"# {run.info.run_name}"
        yield from list_fields("param", run.data.params)
        tags = {n: t for n, t in run.data.tags.items() if not n.startswith(USERS)}
        yield from list_fields("tag", tags)
        yield from (f"  artifact {path}" for path in list_artifacts(client, run.info.run_id))


COPIED = {
    **{"samples": samples, "damaged": damaged, "published": published},
    **{"mlflow": mlflow, "trackio": trackio, "wandb": wandb},
}
"""What changes a folder, or writes into it."""
SHOWN_OF_COPIES = [
    *(("sublayers", kind) for kind in ("samples", "damaged", "published")),
    *((name, "mlflow") for name in ("layers", "sublayers", "spans", "repeats", "heads", "maps")),
    *((name, "mlflow") for name in ("prune", "quantise", "half_precision", "replaced")),
    *product(("corpus", "experts", "until"), ("mlflow", "trackio", "wandb")),
]
"""To MLflow, cells of each kind of runs; to the others, those whose figures are others."""


@pytest.mark.parametrize(("name", "kind"), SHOWN_OF_COPIES)
def test_outputs_of_a_copied_folder(name, kind, unpacked, compare, template, tmp_path, monkeypatch):
    shutil.copytree(unpacked(name) / RESULTS, tmp_path / RESULTS)
    shutil.copy(template, tmp_path / RESULTS / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    # Programs that are printed to be typed are named by themselves where they are found.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    compare(name, kind, COPIED[kind](tmp_path, name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_a_folder(name, kind, unpacked, compare, monkeypatch):
    folder = unpacked(name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    compare(name, kind, KINDS[kind](folder))
