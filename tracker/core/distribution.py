"""The distribution: its name, its version, and what a user types to install from it.

The command and the import are `tracker`, which on PyPI is another program: the distribution is
`layer-tracker`. A checkout is installed from its folder, whatever an index holds.
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
"""Of a results folder and of each file in it: the only one that is read and written."""

EXAMPLES = Path(__file__).resolve().parents[1] / "experiments"
"""The example experiments: a link to those of the checkout, and files in a wheel."""
_ROOT = Path(__file__).resolve().parents[2]


def pip_install(*arguments: str) -> str:
    """Say how something gets into the environment that runs, whichever `pip` the shell finds.

    The command can be pasted into a shell in any folder.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def install_extra(extra: str) -> str:
    """Give the command that installs the packages of an extra."""
    if _is_checkout():
        return pip_install("--editable", f"{_ROOT}[{extra}]")
    return pip_install(f"{NAME}[{extra}]")


def package_folder(module: str) -> Path | None:
    """Find the folder of an installed package, which is not imported; None where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) if places else None


def upgrade() -> str:
    """Give the command that installs a newer tracker."""
    if _is_checkout():
        pull = shlex.join(["git", "-C", str(_ROOT), "pull"])
        return f"{pull} && {pip_install('--editable', str(_ROOT))}"
    return pip_install("--upgrade", NAME)


def other_format(number: object) -> str:
    """Return what to do about files of another format; empty for the format that is read."""
    if number == FORMAT:
        return ""
    age, advice = "an older", "Read it with that one"
    if isinstance(number, int) and number > FORMAT:
        age, advice = "a newer", f"Upgrade ({upgrade()})"
    return f"was written by {age} tracker (format {number}; this one knows {FORMAT}). {advice}"


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()
