"""Mutation testing: small changes to a module, each of which its tests should notice.

`make mutants` runs it over every module that `[tool.tracker.mutants]` in pyproject.toml gives
tests, or over those named in MODULE; each survivor is printed as a diff, and last comes a table.
A mutant that no test reaches has survived. SAMPLE=30 tries thirty of each module, drawn at random
and the same ones every time. It is no test itself, and a script rather than a module of `tests`:
mutmut imports that package anew, from its copy in `mutants/`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import tomllib
from collections import Counter
from pathlib import Path

from mutmut.__main__ import cli
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

OUTCOME_COLUMNS = {"killed": "killed", "survived": "survived", "no tests": "survived"}
"""What mutmut says, and our column for it; all else ran out of time."""


def find_tests(module: str, tests_by_path: dict[str, list[str]]) -> list[str]:
    """Look up the tests of a module: its own, or else those of the nearest folder."""
    if not Path(module).is_file():
        raise SystemExit(f"there is no module {module}; one is tracker/engine/scoring/rows.py")
    for path_text in (module, *map(str, Path(module).parents)):
        if path_text in tests_by_path:
            return tests_by_path[path_text]
    known_paths = ", ".join(tests_by_path)
    raise SystemExit(f"{module} has no tests in [tool.tracker.mutants]; that names {known_paths}")


def list_mutants(module: str) -> list[str]:
    """List the names of a module's mutants."""
    path = Path(module)
    mutated = mutate_file_contents(module, path.read_text(encoding="utf-8"))
    return [get_mutant_name(path, name) for name in mutated.mutant_names]


def run_mutants(
    module: str, tests: list[str], sample: int | None, results: multiprocessing.Queue
) -> None:
    """Try the mutants of one module in a process of its own, since mutmut keeps its state."""
    config().only_mutate = [module]
    config().pytest_add_cli_args_test_selection = tests
    # One at a time: the tests that are timed have the machine as they had it before.
    names = list_mutants(module)
    sampled = names if sample is None else random.Random(0).sample(names, min(sample, len(names)))
    # Without names it tries all.
    selected = [] if len(sampled) == len(names) else sampled
    cli.main(["run", "--max-children", "1", *selected], standalone_mode=False)
    mutation_data = SourceFileMutationData(path=module)
    mutation_data.load()
    counts: Counter[str] = Counter()
    for name in sampled:
        code = mutation_data.exit_code_by_key[name]
        outcome = OUTCOME_COLUMNS.get(status_by_exit_code[code], "timeout")
        counts[outcome] += 1
        if outcome != "killed":
            sys.stdout.write(f"\n{outcome}: {name}\n{get_diff_for_mutant(name, path=module)}\n")
    sys.stdout.flush()
    results.put((counts, len(names)))


def main(modules: list[str], sample: int | None) -> None:
    """Print the survivors of some modules, and the table."""
    tests_by_path = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["tracker"]["mutants"]
    if not modules:
        modules = sorted(
            str(path)
            for name in tests_by_path
            for path in ([Path(name)] if name.endswith(".py") else Path(name).rglob("*.py"))
            if path.name != "__init__.py"
        )
    table = [f"{'module':32}{'mutants':>9}{'killed':>9}{'survived':>9}{'timeout':>9}"]
    for module in dict.fromkeys(modules):
        tests = find_tests(module, tests_by_path)
        # What an earlier run left would be taken for results.
        shutil.rmtree("mutants", ignore_errors=True)
        results: multiprocessing.Queue[tuple[Counter[str], int]] = multiprocessing.Queue()
        process = multiprocessing.Process(target=run_mutants, args=(module, tests, sample, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{module}: mutmut failed, see above")
        counts, total = results.get()
        n_tried = counts.total()
        numbers = (n_tried, *(counts[outcome] for outcome in ("killed", "survived", "timeout")))
        note = f"   {n_tried} of {total} drawn" if n_tried < total else ""
        table.append(f"{module:32}" + "".join(f"{number:9}" for number in numbers) + note)
    sys.stdout.write("\n".join([*table, ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module")
    parsed = parser.parse_args()
    if parsed.sample is not None and parsed.sample < 1:
        parser.error(f"--sample is {parsed.sample}; it takes 1 or more")
    main(parsed.modules, parsed.sample)
