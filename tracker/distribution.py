"""The distribution: its name, its version, and what a user types to install from it.

The command and the import are `tracker`, which on PyPI is another program: the distribution is
`layer-tracker`. A checkout is installed from its folder, whatever an index holds.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

NAME = "layer-tracker"
__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parents[1]


def pip_install(*arguments: str) -> str:
    """Say how something gets into the environment that runs, whichever `pip` the shell finds.

    Args:
        *arguments: What follows `pip install`.

    Returns:
        The command, ready to be pasted into a shell in any folder.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def install_extra(extra: str) -> str:
    """Say how the packages of an extra are installed.

    Args:
        extra: One of the distribution's optional dependencies.

    Returns:
        The command.
    """
    if _is_checkout():
        return pip_install("--editable", f"{_ROOT}[{extra}]")
    return pip_install(f"{NAME}[{extra}]")


def upgrade() -> str:
    """Say how a newer tracker is installed.

    Returns:
        The command.
    """
    if _is_checkout():
        pull = shlex.join(["git", "-C", str(_ROOT), "pull"])
        return f"{pull} && {pip_install('--editable', str(_ROOT))}"
    return pip_install("--upgrade", NAME)


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()
