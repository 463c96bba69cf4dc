"""Extensions of other packages, by their entry points; broken ones are left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import golden
from tests.helpers.mlflow_store import MlflowStoreReader
from tests.helpers.runs import write_arc

EXAMPLE = Path(__file__).parent / "helpers" / "example_extension"
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
def example(tmp_path_factory) -> Path:
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
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not result.returncode, result.stderr
    return result


def test_one_package_provides_an_extension_of_each_kind(
    example, tiny_llama, experiment, tmp_path, template
):
    write_arc(tmp_path / "data", 8)
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
    result = run_python(
        example,
        COMMANDS,
        json.dumps(commands),
        LAB_DATA=str(tmp_path),
        MLFLOW_TRACKING_URI=f"sqlite:///{database}",
    )
    output = result.stdout
    listed = output.partition("Extensions:")[2].partition("<run --help>")[0]
    assert [line.split()[:2] for line in listed.splitlines() if line.strip()] == [
        [kind, name] for kind, name in NAMES.items()
    ]
    assert {line[-1] for line in output.splitlines() if line.startswith("<")} == {"0"}, output
    words = " ".join(output.split())
    for text in ("|announced]", ", sign1.", "parity", "--at-least", "1 jobs of example-extension"):
        assert text in words
    page = (results / "report.html").read_text()
    for text in ("update norm", "itself in sign1", "even layers cost", "lab:data"):
        assert text in page
    store = MlflowStoreReader(f"sqlite:///{database}", "layers")
    entries = json.loads((results / "layers.json").read_text())
    assert entries.keys() == store.by_key.keys()
    norms = {key: entry["update_norm"] for key, entry in entries.items() if "update_norm" in entry}
    assert len(norms) == 4
    for key, norm in norms.items():
        assert norm > 0
        assert store.by_key[key].data.metrics["update_norm"] == pytest.approx(norm)
    ablations = {run.data.params.get("ablation") for run in store.runs}
    assert ablations >= {f"{word}:{layer}" for word in ("layer", "sign1") for layer in range(4)}


BROKEN = """
from tracker.schema.proxies import Proxy

def fail(*arguments):
    raise RuntimeError("out of order")

LATE = Proxy("late", "late", "figure", observe=fail)
SUMS = Proxy("sums", "sums", "figure", observe=lambda before, after: after.sum())
ACCURACY = Proxy("accuracy", "accuracy", "figure", observe=fail)
"""
BROKEN_FORMATS = """
from tracker.schema.weight_formats import WeightFormat

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
[layer_tracker.tracking]
exits = broken_exit:Any
gone = nosuchmodule:Any
missing = broken:Missing
seven = broken:__name__
"""
USE = """
import torch
from tracker.benchmarks.sources import open_data_source
from tracker.schema.errors import BenchmarkError, CellError
from tracker.schema.proxies import OBSERVED, observed
from tracker.models.rounding import round_weight
from tracker.studies.registry import STUDIES, load_studies
from tracker.tracking import backends

for _ in range(2):
    figures = observed(torch.ones(3, 2), torch.ones(3, 2))
for proxy, figure in zip(OBSERVED, figures, strict=True):
    print(proxy.name, figure.isnan().all().item())
assert {*load_studies()} == {*STUDIES}
assert list(backends()) == ["mlflow", "wandb", "trackio"]
for call in (lambda: open_data_source("lab"), lambda: round_weight(torch.ones(2, 2), "wrong")):
    try:
        call()
    except (BenchmarkError, CellError) as error:
        print(error)
"""


def test_broken_extensions_of_all_kinds_take_nothing_down(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "broken_formats.py").write_text(BROKEN_FORMATS)
    (tmp_path / "broken_exit.py").write_text("raise SystemExit(3)")
    info = tmp_path / "broken-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(POINTS)
    result = run_python(tmp_path, USE)
    assert result.stdout.splitlines() == [
        *("cosine_score False", "angular_distance False", "relative_update False"),
        *("late True", "sums True"),
        "data: 'lab' cannot be opened: RuntimeError: out of order",
        "wrong cannot round weights: out of order",
    ]
    lines = re.sub(" at 0x[0-9a-f]+", "", result.stderr).splitlines()
    warnings = [line.partition("of broken 1.2 ")[2] or line for line in lines]
    assert sorted(warnings) == sorted(line for (line,) in golden("broken_extensions"))


def test_worked_examples_of_the_docs_are_the_example_package():
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    modules = [path.read_text() for path in sorted((EXAMPLE / "example_extension").glob("*.py"))]
    project = (EXAMPLE / "pyproject.toml").read_text()
    assert {*blocks} == {project, *modules[1:]}
    assert max(block.count("\n") for block in blocks) <= 40
