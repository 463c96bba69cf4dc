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
from tests.tools.oldest import oldest
from tracker.core import distribution

ROOT = Path(__file__).parents[1]
PARTS = (
    *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("Makefile", "setup.py", ".ci", ".github", "experiments", "tests", "tracker"),
)


def files(*parts: str) -> set[str]:
    """Return the files that some folders and names stand for."""
    found = [path for part in parts for path in (ROOT / part, *(ROOT / part).rglob("*"))]
    there = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in there}


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
    made = copy.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    name = f"layer_tracker-{tracker.__version__}"
    assert {path.name for path in made.iterdir()} == {f"{name}-py3-none-any.whl", f"{name}.tar.gz"}
    with tarfile.open(made / f"{name}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{name}/") for member in archive if member.isfile()}
    return names, zipfile.ZipFile(made / f"{name}-py3-none-any.whl")


def test_the_source_distribution_can_build_demonstrate_and_test_itself(built):
    names, _ = built
    assert files(*PARTS) - names == set()
    made = {"PKG-INFO", "setup.cfg", "layer_tracker.egg-info"}
    assert {name.partition("/")[0] for name in names} <= {*PARTS, *made}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    about = f"layer_tracker-{tracker.__version__}.dist-info/"
    names = set(wheel.namelist())
    examples = {f"tracker/{name}" for name in files("experiments")}
    package = files("tracker") | examples
    assert {name for name in names if not name.startswith(about)} == package
    assert {"tracker/py.typed", "tracker/report/page/templates/report.html.j2"} <= names
    assert wheel.read(f"{about}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    scripts = wheel.read(f"{about}entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "tracker", "=", "tracker.cli:main"]
    metadata = HeaderParser().parsestr(wheel.read(f"{about}METADATA").decode())
    assert metadata["Name"] == distribution.NAME == "layer-tracker"
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
    needed = [re.split(r"[\[<>=!; ]", text)[0] for text in metadata.get_all("Requires-Dist", [])]
    assert "tracker" not in needed


def test_the_metadata_describe_the_project_as_pypi_shows_it(built):
    _, wheel = built
    about = f"layer_tracker-{tracker.__version__}.dist-info/METADATA"
    metadata = HeaderParser().parsestr(wheel.read(about).decode())
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
    tested = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert all(f'python: "{version}"' in tested for version in (versions[0], versions[-1]))


def test_the_newest_release_of_the_changelog_is_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, newest, *_ = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert unreleased == "[Unreleased]"
    assert re.fullmatch(r"\[(.+)\] - \d{4}-\d\d-\d\d", newest)[1] == tracker.__version__


def test_every_package_that_is_imported_is_a_dependency_with_a_lower_bound():
    """Was: huggingface_hub came only with others. `make oldest` runs the demo with the bounds."""
    modules = {"lm-eval": "lm_eval", "pyyaml": "yaml", "typing-extensions": "typing_extensions"}
    declared = {modules.get(package, package) for package in oldest()}
    trees = (ast.parse(path.read_text()) for path in (ROOT / "tracker").rglob("*.py"))
    imported: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").split(".")[0])
    extras = {"ray", "submitit", "trackio", "kaleido", "wandb_workspaces"}
    extras |= {"bitsandbytes", "llama_cpp_py_sync", "vllm"}
    # With lm-eval[hf], with jinja2, with pydantic and transformers, which pin them.
    bound = {"peft", "markupsafe", "pydantic_core", "tokenizers"}
    missing = imported - declared - extras - bound - {"tracker", *sys.stdlib_module_names}
    assert not missing


def test_hints_in_a_checkout_name_the_checkout(monkeypatch, tmp_path):
    assert distribution._ROOT == ROOT
    folder = tmp_path / "my checkout"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.setattr(distribution, "_ROOT", folder)
    pip = [sys.executable, "-m", "pip", "install", "--editable"]
    assert shlex.split(distribution.install_extra("ray")) == [*pip, f"{folder}[ray]"]
    pull, _, installs = distribution.upgrade().partition(" && ")
    assert shlex.split(pull) == ["git", "-C", str(folder), "pull"]
    assert shlex.split(installs) == [*pip, str(folder)]


def test_hints_of_an_installed_wheel_name_the_distribution(monkeypatch, tmp_path):
    monkeypatch.setattr(distribution, "_ROOT", tmp_path)
    pip = [sys.executable, "-m", "pip", "install"]
    assert shlex.split(distribution.install_extra("ray")) == [*pip, "layer-tracker[ray]"]
    assert shlex.split(distribution.upgrade()) == [*pip, "--upgrade", "layer-tracker"]


def test_nobody_is_told_to_install_the_other_tracker():
    words = re.compile(r"""pip install [^`\n]*?(?<![-\w/])['"]?tracker\b|['"]tracker\[""")
    texts = [*files("tracker", "experiments", ".ci"), "README.md", "CONTRIBUTING.md", "Makefile"]
    told = [name for name in texts if words.search((ROOT / name).read_text(encoding="utf-8"))]
    assert told == []


def test_every_extra_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert [name for name in extras if f"`{name}`" not in text] == ["dev"]
