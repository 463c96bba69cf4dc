"""Test the wheel, the source distribution, and the instructions for installing."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import tracker
from tests.tools.oldest import oldest_versions
from tracker.schema import distribution

ROOT = Path(__file__).parents[1]
PARTS = (
    *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("Makefile", "setup.py", ".ci", ".github", "experiments", "tests", "tracker"),
)


def files(*parts: str) -> set[str]:
    """Return the files of some folders and names."""
    paths = [path for part in parts for path in (ROOT / part, *(ROOT / part).rglob("*"))]
    existing = (path for path in paths if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in existing}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[set[str], zipfile.ZipFile]:
    """Build the source distribution and the wheel, and list their names."""
    # A copy: setuptools would hand out once more whatever an older build here had listed.
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    copy.mkdir()
    for part in files(*PARTS):
        (copy / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, copy / part)
    (copy / "tracker/experiments").symlink_to("../experiments")
    dist = copy.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    name = f"layer_tracker-{tracker.__version__}"
    assert {path.name for path in dist.iterdir()} == {f"{name}-py3-none-any.whl", f"{name}.tar.gz"}
    with tarfile.open(dist / f"{name}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{name}/") for member in archive if member.isfile()}
    return names, zipfile.ZipFile(dist / f"{name}-py3-none-any.whl")


def test_the_source_distribution_can_build_demonstrate_and_test_itself(built):
    names, _ = built
    assert files(*PARTS) - names == set()
    made = {"PKG-INFO", "setup.cfg", "layer_tracker.egg-info"}
    assert {name.partition("/")[0] for name in names} <= {*PARTS, *made}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    info = f"layer_tracker-{tracker.__version__}.dist-info/"
    names = set(wheel.namelist())
    examples = {f"tracker/{name}" for name in files("experiments")}
    package = files("tracker") | examples
    assert {name for name in names if not name.startswith(info)} == package
    assert {"tracker/py.typed", "tracker/report/page/templates/report.html.j2"} <= names
    assert wheel.read(f"{info}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    scripts = wheel.read(f"{info}entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "tracker", "=", "tracker.cli:main"]
    metadata = HeaderParser().parsestr(wheel.read(f"{info}METADATA").decode())
    assert metadata["Name"] == distribution.DISTRIBUTION_NAME == "layer-tracker"
    assert metadata["Version"] == tracker.__version__
    links = re.findall(r"\]\((.*?)\)|(?:src|srcset)=\"(.*?)\"", metadata.get_payload())
    targets = [link for groups in links for link in groups if link]
    assert len(targets) > 20
    # PyPI's page has no folder beside it, in which a relative link could find its file.
    assert [target for target in targets if not target.startswith("https://")] == []
    paths = [target.partition("HEAD/")[2] for target in targets if "HEAD/" in target]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"ray", "slurm", "trackio", "figures", "quantise", "reports", "dev"}
    # Was: the extra `dev` asked an index for 'tracker', which is somebody else's.
    needs = [re.split(r"[\[<>=!; ]", text)[0] for text in metadata.get_all("Requires-Dist", [])]
    assert "tracker" not in needs


def test_the_metadata_describe_the_project_as_pypi_shows_it(built):
    _, wheel = built
    info = f"layer_tracker-{tracker.__version__}.dist-info/METADATA"
    metadata = HeaderParser().parsestr(wheel.read(info).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The authors of tracker"
    assert "layer importance" in metadata["Keywords"].split(",")
    urls = dict(text.split(", ") for text in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Issues", "Changelog"}
    assert all(url.startswith(distribution.REPOSITORY) for url in urls.values())
    classifiers = metadata.get_all("Classifier", [])
    # A license classifier beside a license expression is refused by PyPI.
    assert [text for text in classifiers if text.startswith("License")] == []
    versions = [text.rpartition(" ")[2] for text in classifiers if ":: Python :: 3." in text]
    assert metadata["Requires-Python"] == f">={versions[0]}"
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert all(f'python: "{version}"' in workflow for version in (versions[0], versions[-1]))


def test_the_newest_release_of_the_changelog_is_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, newest, *_ = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert unreleased == "[Unreleased]"
    assert re.fullmatch(r"\[(.+)\] - \d{4}-\d\d-\d\d", newest)[1] == tracker.__version__


def test_every_package_that_is_imported_is_a_dependency_with_a_lower_bound():
    """Was: huggingface_hub came only with others. `make oldest` runs the demo with the bounds."""
    modules = {"lm-eval": "lm_eval", "pyyaml": "yaml", "typing-extensions": "typing_extensions"}
    declared = {modules.get(package, package) for package in oldest_versions()}
    trees = (ast.parse(path.read_text()) for path in (ROOT / "tracker").rglob("*.py"))
    imported: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").split(".")[0])
    extras = {"ray", "submitit", "trackio", "kaleido", "wandb_workspaces"}
    extras |= {"bitsandbytes", "compressed_tensors", "llama_cpp_py_sync", "vllm"}
    # With lm-eval[hf], with jinja2, with pydantic and transformers, which pin them.
    indirect = {"peft", "markupsafe", "pydantic_core", "tokenizers"}
    missing = imported - declared - extras - indirect - {"tracker", *sys.stdlib_module_names}
    assert not missing


def test_hints_in_a_checkout_name_the_checkout(monkeypatch, tmp_path):
    assert distribution._ROOT == ROOT
    folder = tmp_path / "my checkout"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.setattr(distribution, "_ROOT", folder)
    pip = [sys.executable, "-m", "pip", "install", "--editable"]
    assert shlex.split(distribution.extra_command("ray")) == [*pip, f"{folder}[ray]"]
    pull, _, installs = distribution.upgrade_command().partition(" && ")
    assert shlex.split(pull) == ["git", "-C", str(folder), "pull"]
    assert shlex.split(installs) == [*pip, str(folder)]


def test_hints_of_an_installed_wheel_name_the_distribution(monkeypatch, tmp_path):
    monkeypatch.setattr(distribution, "_ROOT", tmp_path)
    pip = [sys.executable, "-m", "pip", "install"]
    assert shlex.split(distribution.extra_command("ray")) == [*pip, "layer-tracker[ray]"]
    assert shlex.split(distribution.upgrade_command()) == [*pip, "--upgrade", "layer-tracker"]


def test_no_text_names_the_other_package():
    pattern = re.compile(r"""pip install [^`\n]*?(?<![-\w/])['"]?tracker\b|['"]tracker\[""")
    names = [*files("tracker", "experiments", ".ci"), "README.md", "CONTRIBUTING.md", "Makefile"]
    offenders = [name for name in names if pattern.search((ROOT / name).read_text("utf-8"))]
    assert offenders == []


def test_every_extra_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert [name for name in extras if f"`{name}`" not in text] == ["dev"]
