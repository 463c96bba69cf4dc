"""Extensions of other packages, by their entry points; broken ones are left out."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.mlflow_store import Store
from tests.helpers.runs import arc
from tests.tracking.conftest import cell_record
from tracker import tracking
from tracker.core.errors import RequestError, TrackingError
from tracker.core.extensions import load_extensions

Install = Callable[..., None]

EXAMPLE = Path(__file__).parent / "helpers" / "example_extension"
BACKEND = (EXAMPLE / "example_extension" / "tracking.py").read_text()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages, each of one module and some entry points."""
    folder = tmp_path / "site"
    folder.mkdir()

    def install(name: str, code: str, group: str, **points: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (folder / f"{name}.py").write_text(code)
        info = folder / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{point} = {name}:{value}\n" for point, value in points.items())
        (info / "entry_points.txt").write_text(f"[layer_tracker.{group}]\n{lines}")
        tracking.backends.cache_clear()

    monkeypatch.syspath_prepend(folder)
    yield install
    monkeypatch.undo()
    tracking.backends.cache_clear()


def test_a_backend_of_another_package_gets_the_runs(install: Install, tmp_path: Path) -> None:
    install("lab_notebook", BACKEND, "tracking", notebook="NotebookService")
    assert list(tracking.backends()) == ["mlflow", "wandb", "trackio", "notebook"]
    to, cell = tracking.target("notebook:layers"), cell_record(layers=(0, 1))
    backend = tracking.open_backend(to.backend, to.project or "", tmp_path)
    done = backend.publish(cell, [], {})
    assert (done.created, done.location) == (4, f"{tmp_path}/layers.json")
    runs = json.loads((tmp_path / "layers.json").read_text())
    drops = [run.get("accuracy_drop") for run in runs.values()]
    assert drops[:2] == [run.drop.value for run in reversed(cell.runs)]
    assert backend.publish(cell, [], {}).unchanged == 4
    with pytest.raises(TrackingError, match="notebook:layers could not be read: it cannot be"):
        backend.cells()
    with pytest.raises(RequestError, match="Notebook takes no reports; use one of: mlflow, wandb"):
        tracking.target("notebook", "reports")


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("import nosuchmodule", "Any", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("raise SystemExit(3)", "Any", "SystemExit: 3"),
        ("", "Missing", "AttributeError: module 'broken' has no attribute 'Missing'"),
        ("Any = 7", "Any", "TypeError: 7 is no subclass of tracker.tracking.base.Service"),
        (BACKEND.replace("def open(", "def begin("), "NotebookService", "TypeError: Can't inst"),
    ],
)
def test_a_broken_extension_is_named_in_one_line_and_left_out(
    install: Install, caplog: pytest.LogCaptureFixture, code: str, value: str, reason: str
) -> None:
    install("broken", code, "tracking", mine=value)
    with caplog.at_level(logging.WARNING):
        assert list(tracking.backends()) == ["mlflow", "wandb", "trackio"]
        tracking.backends()
    (message,) = caplog.messages
    start = "the extension 'mine' (layer_tracker.tracking) of broken 1.2 is left out: "
    assert message.startswith(start + reason)
    assert "\n" not in message


def test_names_of_ours_are_taken_and_the_first_of_two_stays(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("one", "kind = 1", "formats", int4="kind", int5="kind")
    install("two", "kind = 2", "formats", int5="kind", int6="kind")
    assert load_extensions("formats", lambda kind: kind, reserved=["int4"]) == {
        "int5": 1,
        "int6": 2,
    }
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "ValueError: the name 'int4' is taken",
        "ValueError: the name 'int5' is taken",
    ]


NAMES = {
    "proxies": "update_norm",
    "studies": "parity",
    "tracking": "notebook",
    "formats": "sign1",
    "sources": "lab",
    "executors": "announced",
}
COMMANDS = """
import json, sys
from click.testing import CliRunner
from tracker.cli import main
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, command)
    print(f"<{' '.join(command[:3])}> {done.exit_code}", done.output, sep="\\n")
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example package into a folder of its own."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run(install, check=True)
    return folder / "site"


def run_python(
    site: Path, code: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose Python finds the packages of a folder."""
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done


def test_one_package_provides_an_extension_of_each_kind(
    example: Path, tiny_llama, experiment, tmp_path: Path, template: Path
) -> None:
    arc(tmp_path / "data", 8)
    database = shutil.copy(template, tmp_path / "mlflow.db")
    changes = ["remove", "sign1"]
    file = experiment(
        tiny_llama(intermediate_size=64), data="lab:data", intervention=changes, limit=8
    )
    results = tmp_path / "results"
    options = [str(file), "--results", str(results), "--track", "mlflow:layers,notebook:layers"]
    commands = (
        *(["--help"], ["run", "--help"], ["study", "--help"], ["study", "parity", "--help"]),
        ["run", *options, "--executor", "announced"],
        ["study", "parity", *options, "--at-least", "0.5"],
    )
    done = run_python(
        example,
        COMMANDS,
        json.dumps(commands),
        LAB_DATA=str(tmp_path),
        MLFLOW_TRACKING_URI=f"sqlite:///{database}",
    )
    shown = done.stdout
    listed = shown.partition("Extensions:")[2].partition("<run --help>")[0]
    assert [line.split()[:2] for line in listed.splitlines() if line.strip()] == [
        [kind, name] for kind, name in NAMES.items()
    ]
    assert {line[-1] for line in shown.splitlines() if line.startswith("<")} == {"0"}, shown
    for text in ("|announced]", "|sign1]", "parity", "--at-least", "1 jobs of example-extension"):
        assert text in shown
    page = (results / "report.html").read_text()
    for text in ("update norm", "itself in sign1", "even layers cost", "lab:data"):
        assert text in page
    store = Store(f"sqlite:///{database}", "layers")
    entries = json.loads((results / "layers.json").read_text())
    assert entries.keys() == store.by_key.keys()
    norms = {key: entry["update_norm"] for key, entry in entries.items() if "update_norm" in entry}
    assert len(norms) == 4
    for key, norm in norms.items():
        assert norm > 0
        assert store.by_key[key].data.metrics["update_norm"] == pytest.approx(norm)
    ablations = {run.data.params.get("ablation") for run in store.runs}
    assert ablations >= {f"{word}:{layer}" for word in ("layer", "sign1") for layer in range(4)}


BROKEN_PROXIES = """
from tracker.core.proxies import Proxy

def fail(*arguments):
    raise RuntimeError("out of order")

LATE = Proxy("late", "late", "figure", observe=fail)
SUMS = Proxy("sums", "sums", "figure", observe=lambda before, after: after.sum())
ACCURACY = Proxy("accuracy", "accuracy", "figure", observe=fail)
"""
BROKEN_FORMATS = """
from tracker.core.weight_formats import WeightFormat

def fail(*arguments):
    raise RuntimeError("out of order")

ROUNDLESS = WeightFormat("roundless", "nothing", 0, 1.0, "nobody")
WRONG = WeightFormat("wrong", "wrong", 0, 1.0, "nobody", round=fail)
"""
POINTS = """
[layer_tracker.proxies]
accuracy = broken:ACCURACY
late = broken:LATE
other = broken:SUMS
seven = broken:__name__
sums = broken:SUMS
[layer_tracker.formats]
attention = broken_formats:WRONG
int4 = broken_formats:WRONG
roundless = broken_formats:ROUNDLESS
wrong = broken_formats:WRONG
[layer_tracker.sources]
hub = broken:fail
lab = broken:fail
[layer_tracker.studies]
Audit = broken:fail
settings = broken:fail
"""
USE = """
import torch
from tracker.benchmarks.sources import find_data
from tracker.core.errors import BenchmarkError, CellError
from tracker.core.proxies import OBSERVED, observed
from tracker.models.rounding import in_format
from tracker.studies.registry import STUDIES, studies

for _ in range(2):
    figures = observed(torch.ones(3, 2), torch.ones(3, 2))
for proxy, figure in zip(OBSERVED, figures, strict=True):
    print(proxy.name, figure.isnan().all().item())
assert {*studies()} == {*STUDIES}
for call in (lambda: find_data("lab"), lambda: in_format(torch.ones(2, 2), "wrong")):
    try:
        call()
    except (BenchmarkError, CellError) as error:
        print(error)
"""


def test_broken_extensions_of_all_kinds_take_nothing_down(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN_PROXIES)
    (tmp_path / "broken_formats.py").write_text(BROKEN_FORMATS)
    info = tmp_path / "broken-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(POINTS)
    done = run_python(tmp_path, USE)
    assert done.stdout.splitlines() == [
        *("cosine_score False", "angular_distance False", "relative_update False"),
        *("late True", "sums True"),
        "data: 'lab' cannot be opened: RuntimeError: out of order",
        "wrong cannot round weights: out of order",
    ]
    lines = re.sub(" at 0x[0-9a-f]+", "", done.stderr).splitlines()
    warnings = [line.partition("of broken 1.2 ")[2] or line for line in lines]
    assert sorted(warnings) == sorted(
        [
            "is left out: ValueError: the name 'attention' is taken",
            "is left out: ValueError: the name 'int4' is taken",
            "is left out: ValueError: it has no function `round`",
            "is left out: ValueError: the name 'accuracy' is taken",
            "is left out: ValueError: it is called 'sums'; name its entry point so too",
            "is left out: TypeError: 'broken' is no tracker.core.proxies.Proxy",
            "the proxy 'late' is undefined: RuntimeError: out of order",
            "the proxy 'sums' is undefined: ValueError: its figures have the shape (), "
            "and not (3,)",
            "is left out: ValueError: a name has lower-case letters, digits and _, a letter first",
            "is left out: TypeError: <function fail> is no subclass of "
            "tracker.studies.registry.StudySettings",
            "is left out: ValueError: the name 'hub' is taken",
        ]
    )


def test_worked_examples_of_the_docs_are_the_example_package() -> None:
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    modules = [path.read_text() for path in sorted((EXAMPLE / "example_extension").glob("*.py"))]
    project = (EXAMPLE / "pyproject.toml").read_text()
    assert {*blocks} == {project, *modules[1:]}
    assert max(block.count("\n") for block in blocks) <= 40
