"""Define the package's name, version, installation commands and callable packages.

The command and the import package are named `tracker`. On PyPI, another project has this name, so
the distribution is named `layer-tracker`.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

DISTRIBUTION_NAME = "layer-tracker"
__version__ = "0.1.0"
REPOSITORY = "https://github.com/layer-tracker/layer-tracker"
UNSUPPORTED_SYSTEM = "tracker runs on Linux and macOS; on Windows, use it inside WSL 2"
LEDGER_FORMAT = 3
"""Version number of the format of results folders; other versions are not read or written."""

EXAMPLES_FOLDER = Path(__file__).resolve().parents[1] / "experiments"
"""The folder of example experiments, in the installed wheel or in the checkout."""
_ROOT = Path(__file__).resolve().parents[2]


def pip_command(*arguments: str) -> str:
    """Return the command that installs packages into the running environment.

    Users can paste the command into a shell in any folder.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def extra_command(extra: str) -> str:
    """Return the command that installs the packages of one optional extra."""
    if _is_checkout():
        return pip_command("--editable", f"{_ROOT}[{extra}]")
    return pip_command(f"{DISTRIBUTION_NAME}[{extra}]")


def package_folder(module: str) -> Path | None:
    """Return a package's folder without importing the package; None if it is missing."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(folders[0]) if folders else None


def upgrade_command() -> str:
    """Return the command that upgrades tracker."""
    if _is_checkout():
        pull_command = shlex.join(["git", "-C", str(_ROOT), "pull"])
        return f"{pull_command} && {pip_command('--editable', str(_ROOT))}"
    return pip_command("--upgrade", DISTRIBUTION_NAME)


def version_problem(version: object) -> str:
    """Return an error message if this version of tracker cannot read a results folder.

    `version` is the format version of the folder. The message is empty if the folder can be read.
    """
    if version == LEDGER_FORMAT:
        return ""
    advice = "Read the results with the older version of tracker that wrote the results"
    if isinstance(version, int) and version > LEDGER_FORMAT:
        advice = f"Upgrade tracker ({upgrade_command()})"
    return (
        f"has format {version}, but this version of tracker reads format {LEDGER_FORMAT}. {advice}"
    )


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()


class ApiPackage(ModuleType):
    """Package that can be called like the API function with the same name.

    After an import of a module in the package `tracker.NAME`, Python binds `tracker.NAME` to the
    package instead of the API function. Calling the package calls the API function.
    """

    @property
    def __call__(self) -> Any:
        """The API function that runs when the package is called."""
        return getattr(import_module("tracker.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        """The signature of the API function."""
        from inspect import signature

        return signature(self.__call__)
