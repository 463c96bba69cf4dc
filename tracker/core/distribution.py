"""Define the package's name, version and installation commands.

The command and the import are `tracker`. That name is taken on PyPI, so the distribution is
`layer-tracker`. A checkout is always installed from its folder.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

NAME = "layer-tracker"
__version__ = "0.1.0"
REPOSITORY = "https://github.com/layer-tracker/layer-tracker"
UNSUPPORTED = "tracker runs on Linux and macOS; on Windows, use it inside WSL 2"
FORMAT = 3
"""The format of a results folder and its files; no other one is read or written."""

EXAMPLES = Path(__file__).resolve().parents[1] / "experiments"
"""The folder of example experiments: in a wheel, or the checkout's."""
_ROOT = Path(__file__).resolve().parents[2]


def pip_install(*arguments: str) -> str:
    """Return the command that installs packages into the running environment.

    The command can be pasted into a shell in any folder.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def install_extra(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    if _is_checkout():
        return pip_install("--editable", f"{_ROOT}[{extra}]")
    return pip_install(f"{NAME}[{extra}]")


def package_folder(module: str) -> Path | None:
    """Find the folder of an installed package without importing it; None if not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) if places else None


def upgrade() -> str:
    """Return the command that upgrades tracker."""
    if _is_checkout():
        pull = shlex.join(["git", "-C", str(_ROOT), "pull"])
        return f"{pull} && {pip_install('--editable', str(_ROOT))}"
    return pip_install("--upgrade", NAME)


def other_format(number: object) -> str:
    """Return the message for files of another format; empty for the current format."""
    if number == FORMAT:
        return ""
    age, advice = "an older", "Read it with that one"
    if isinstance(number, int) and number > FORMAT:
        age, advice = "a newer", f"Upgrade ({upgrade()})"
    return f"was written by {age} tracker (format {number}; this one knows {FORMAT}). {advice}"


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()
