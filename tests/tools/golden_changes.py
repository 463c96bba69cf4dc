"""Compare the figures of golden files with a commit: `python -m tests.tools.golden_changes COMMIT`.

Lists each golden file whose numbers and units, read in order, are not those of the commit: a change
of wording alone lists none.
"""

from __future__ import annotations

import re
import subprocess
import sys

from tests.tools.language import ROOT

GOLDEN = "tests/golden"
FIGURE = re.compile(
    r"[+\-−±]?\d+(?:[.,]\d+)*(?:e[+\-]?\d+)?(?:\s?(?:%|pp|×|GiB|MB|TFLOP|nats)(?!\w))?"
)


def figures(text: str) -> list[str]:
    """List the numbers of a text with their units, in order."""
    return FIGURE.findall(text)


def run_git(*arguments: str) -> str:
    """Return the output of a git command; empty if it fails."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def main(commit: str) -> int:
    """Print the files whose figures differ; return 1 if there are any."""
    changed = run_git("diff", "--name-only", "--diff-filter=M", commit, "--", GOLDEN).split()
    changed = [name for name in changed if name.endswith(".txt")]
    different = 0
    for name in changed:
        path = ROOT / name
        after = figures(path.read_text(encoding="utf-8")) if path.exists() else []
        before = figures(run_git("show", f"{commit}:{name}"))
        if before != after:
            different += 1
            print(f"{name}: {len(before)} figures before, {len(after)} now")  # noqa: T201
    print(f"{len(changed)} golden files changed, {different} of them in their figures")  # noqa: T201
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
