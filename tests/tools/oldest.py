"""Print constraints for pip: the oldest version of each package that tracker depends on.

PyTorch is left out: its oldest version takes gigabytes where another one is installed already.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)")


def oldest_versions() -> dict[str, str]:
    """Return the lower bound of each dependency in pyproject.toml: package → version."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    requirements = tomllib.loads(file.read_text())["project"]["dependencies"]
    matches = {requirement: REQUIREMENT.match(requirement) for requirement in requirements}
    unbounded = [requirement for requirement, match in matches.items() if match is None]
    assert not unbounded, f"without a lower bound: {unbounded}"
    return {match[1]: match[2] for match in matches.values() if match}


if __name__ == "__main__":
    pins = [f"{package}=={version}\n" for package, version in oldest_versions().items()]
    sys.stdout.writelines(pin for pin in pins if not pin.startswith("torch="))
