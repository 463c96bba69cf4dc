"""The verdicts on all variants, kept in `docs/families.csv`, and the pages that are made of them.

`make families` examines each variant whose verdict is missing or of other code, a row at a time, so
that it goes on where it was stopped: on another day, in another checkout that has the file.
"""

from __future__ import annotations

import ast
import csv
import io
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from tests.helpers.registry import FAMILY_NAMES, NOT_BUILT, Variant, families
from tests.tools.survey import (
    CRASH,
    DISCONTINUOUS,
    EXACT,
    FAILURES,
    NO_VARIANT,
    ORDER,
    REFUSED,
    WRONG,
    Verdict,
    examine_variant,
    prepare_process,
)
from tests.tools.variants import variants
from tracker.ledger.files import write_text
from tracker.schema.provenance import content_hash

ROOT = Path(__file__).parents[2]
VERDICTS_FILE = ROOT / "docs" / "families.csv"
FAMILIES_PAGE = VERDICTS_FILE.with_suffix(".md")
MODELS_PAGE = FAMILIES_PAGE.with_name("models.md")
PROCESSES = 2
COLUMNS = ("family", "variant", "verdict", "shared", "difference", "idle", "why", "state")

PAGE_HEAD = """\
# All model families

This page shows how much computation is shared for each model family of transformers, and whether
results are exact. `make families` measures all families, and writes this page and
[families.csv](families.csv).

`families.csv` lists {held:,} of {every:,} model variants, measured with {versions} of tracker,
torch and transformers (now {version}). Variants are tiny random models with different windows,
chunks, layer kinds, rotary positions and other settings. Each tiny model scores documents of many
lengths, in two document orders. The reference is one plain forward pass per request through a
checkpoint without the layer, written by `tracker export`. If `tracker export` cannot remove the
layer, the plain forward pass skips the layer in memory.

Number of variants by result:
**{counts}.** Another {others} variants
have settings that the model class rejects. For *exact* model variants, log-likelihoods of `tracker`
and of plain forward passes differ by at most {largest:.1g} nats.

| shared | computed once |
|---|---|
| `documents` | prefixes common to all documents, and `tokens` |
| `tokens` | prefixes common to a document's requests, and `depth` |
| `depth` | layers below the removed one |

The table lists only families whose variants are not all exact, or do not all share the same
computation. Model variants are *discontinuous* if float32 rounding changes the choice of a router
or a top-k, but float64 results are exact.

"""
SHARING_WORDS = {
    "documents": "over depth, tokens and documents",
    "tokens": "over depth and tokens",
    "depth": "over depth",
    "nothing": "nothing: one plain pass per request",
    "–": "refused",
}
MAX_NAMED = 4
"""As many variants are counted, not named."""
TABLE_BEGIN, TABLE_END = "<!-- made by `make families` -->\n", "\n<!-- end -->"


def code_state() -> str:
    """Name the code that measures and is measured, and what computes."""
    measured_paths = [
        path
        for package in ("engine", "models")
        for path in (ROOT / "tracker" / package).rglob("*.py")
    ]
    test_paths = [
        ROOT / "tests" / f"{name}.py"
        for name in ("tools/survey", "tools/variants", "helpers/registry", "helpers/engines")
    ]
    code = {
        str(path.relative_to(ROOT)): without_comments(path.read_text())
        for path in (*measured_paths, *test_paths)
    }
    return content_hash([code, torch.__version__, transformers.__version__])[:8]


class _NoDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def without_comments(module: str) -> str:
    """Write a module without its comments and docstrings, which change no verdict."""
    return ast.unparse(_NoDocstrings().visit(ast.parse(module)))


def read_verdicts(path: Path = VERDICTS_FILE) -> list[Verdict]:
    """Read the verdicts of all states."""
    if not path.exists():
        return []
    return [
        Verdict(
            Variant(row["family"], row["variant"], {}),
            row["verdict"],
            row["shared"],
            float(row["difference"]),
            row["why"],
            tuple(map(int, row["idle"].split())),
            state=row["state"],
        )
        for row in csv.DictReader(io.StringIO(path.read_text()))
    ]


def write_verdicts(verdicts: Sequence[Verdict], path: Path = VERDICTS_FILE) -> None:
    """Write all verdicts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for verdict in sorted(verdicts, key=lambda row: str(row.variant)):
        difference, idle = f"{verdict.difference:.1e}", " ".join(map(str, verdict.idle))
        variant_names = (verdict.variant.family, verdict.variant.name)
        writer.writerow(
            [
                *variant_names,
                verdict.verdict,
                verdict.shared,
                difference,
                idle,
                verdict.why,
                verdict.state,
            ]
        )
    write_text(path, text.getvalue())


def main() -> int:
    """Examine every variant, or those of the families that are typed; print a line each."""
    family_names = sys.argv[1:] or families()
    if unknown := set(family_names) - set(families()):
        print(f"no family of docs/families.md: {', '.join(sorted(unknown))}")  # noqa: T201
        return 2
    current_state, all_variants = (
        code_state(),
        [variant for family in families() for variant in variants(family)],
    )
    todo = [variant for variant in all_variants if variant.family in family_names]
    stored = {str(stored_verdict.variant): stored_verdict for stored_verdict in read_verdicts()}
    verdicts = {name: stored[name] for name in map(str, all_variants) if name in stored}
    remaining = find_remaining(todo, [*verdicts.values()], current_state)
    print(f"{len(todo) - len(remaining)} of {len(todo)} are known")  # noqa: T201
    with multiprocessing.get_context("spawn").Pool(PROCESSES, prepare_process) as pool:
        try:
            for count, verdict in enumerate(pool.imap_unordered(examine_variant, remaining), 1):
                verdicts[str(verdict.variant)] = replace(verdict, state=current_state)
                write_verdicts([*verdicts.values()])
                print(f"{count}/{len(remaining)} {verdict}", flush=True)  # noqa: T201
        except KeyboardInterrupt:
            pool.terminate()
            print("stopped; the same command goes on")  # noqa: T201
    write_pages(
        read_verdicts(), len(all_variants)
    )  # as they were kept, so that the file alone makes the pages
    listed = [verdicts[name] for name in map(str, todo) if name in verdicts]
    for name, n_verdicts in Counter(row.verdict for row in listed).most_common():
        print(f"{name}: {n_verdicts}")  # noqa: T201
    if sum(row.state == current_state for row in listed) < len(todo):
        return 130
    return int(any(row.verdict in FAILURES for row in listed))


def find_remaining(
    todo: Sequence[Variant], verdicts: Sequence[Verdict], current_state: str
) -> list[Variant]:
    """Find what is to be examined: what is not known of this state, and what failed."""
    settled = {
        str(verdict.variant)
        for verdict in verdicts
        if verdict.state == current_state and verdict.verdict not in FAILURES
    }
    return [variant for variant in todo if str(variant) not in settled]


def write_pages(verdicts: Sequence[Verdict], n_variants: int) -> None:
    """Write the page, and the short table into `docs/models.md`."""
    write_text(FAMILIES_PAGE, page(verdicts, n_variants))
    head, _, remainder = MODELS_PAGE.read_text().partition(TABLE_BEGIN)
    _, _, tail = remainder.partition(TABLE_END)
    write_text(
        MODELS_PAGE, head + TABLE_BEGIN + short_table(verdicts, n_variants) + TABLE_END + tail
    )


def page(verdicts: Sequence[Verdict], n_variants: int) -> str:
    """Write the page of so many variants: their number by verdict, and the table."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    n_versions = len({verdict.state for verdict in verdicts})
    return PAGE_HEAD.format(
        held=len(verdicts),
        every=n_variants,
        versions="one version" if n_versions == 1 else f"{n_versions} versions",
        version=transformers.__version__,
        counts=f"exact: {counts[EXACT]}, refused: {counts[REFUSED]}, discontinuous: "
        f"{counts[DISCONTINUOUS]}, silently wrong: {counts[WRONG]}, crashed: {counts[CRASH]}",
        others=counts[NO_VARIANT],
        largest=max(
            (verdict.difference for verdict in verdicts if verdict.verdict == EXACT), default=0
        ),
    ) + table(verdicts)


def table(verdicts: Sequence[Verdict]) -> str:
    """Merge the variants of each family, and list what is not built."""
    families: dict[tuple[str, str], list[str]] = {}
    for family, of_family in _group_verdicts(verdicts).items():
        shared, refusals = _table_columns(of_family)
        if ";" in shared or refusals:
            families.setdefault((shared, refusals), []).append(family)
    lines = ["| families | shared | not exact |", "|---|---|---|"]
    lines += [
        f"| {', '.join(names)} | {shared} | {refusals} |"
        for (shared, refusals), names in families.items()
    ]
    reasons: dict[str, list[str]] = {}
    for family in FAMILY_NAMES:
        if family in NOT_BUILT:
            reasons.setdefault(NOT_BUILT[family], []).append(family)
    lines += ["", "## Not built", "", "| reason | families |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


def _table_columns(verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """Return how far a family shares, and its variants that are not exact."""
    exact = [verdict for verdict in verdicts if verdict.verdict == EXACT]
    usual_sharing = _usual_sharing(verdicts)
    shared = [] if usual_sharing is None else [usual_sharing]
    for sharing in sorted({verdict.shared for verdict in exact} - {usual_sharing}):
        names = [verdict.variant.name for verdict in exact if verdict.shared == sharing]
        shared.append(f"{sharing}: {_list_names(names, len(verdicts))}")
    names_by_text: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.verdict not in (EXACT, NO_VARIANT):
            difference = "" if verdict.verdict == REFUSED else f" by {verdict.difference:.2g} nats"
            reason = f" ({_first_clause(verdict.why)})" if verdict.verdict == REFUSED else ""
            text = f"{verdict.verdict}{difference}{reason}"
            names_by_text.setdefault(text, []).append(verdict.variant.name)
    refusals = "; ".join(
        f"{text}: {_list_names(names, len(verdicts))}" for text, names in names_by_text.items()
    )
    return "; ".join(shared) or "–", refusals.replace("|", "\\|")


def _first_clause(reason: str) -> str:
    """Return the first clause of an error, without its type and the model's class."""
    message = re.sub(r"^\w+Error: (\w+For\w+:? )?", "", reason)
    return re.split(r"[:;] | \(", message)[0]


def _list_names(names: Sequence[str], total: int) -> str:
    """Name a few variants, and count many."""
    if len(names) == total:
        return "all"
    return ", ".join(names) if len(names) < MAX_NAMED else f"{len(names)} of {total} variants"


def short_table(verdicts: Sequence[Verdict], n_variants: int) -> str:
    """Summarise how far families share, for `docs/models.md`, and whether some are missing."""
    by_sharing: dict[str, dict[str, None]] = {sharing: {} for sharing in SHARING_WORDS}
    for family, family_verdicts in _group_verdicts(verdicts).items():
        by_sharing[_usual_sharing(family_verdicts) or "–"][family.removesuffix("_text")] = None
    lines = []
    if len(verdicts) < n_variants:
        lines = [
            f"{len(verdicts):,} of {n_variants:,} variants so far; a family that is not named is",
            "held against the truth before each cell like all others.",
            "",
        ]
    lines += ["| shared | families (by most of their variants) |", "|---|---|"]
    lines += [
        f"| {SHARING_WORDS[sharing]} | {len(names)}: {', '.join(names) or 'none'} |"
        for sharing, names in by_sharing.items()
    ]
    return "\n".join(lines)


def _group_verdicts(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    verdicts_by_family: dict[str, list[Verdict]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: str(verdict.variant)):
        verdicts_by_family.setdefault(verdict.variant.family, []).append(verdict)
    return verdicts_by_family


def _usual_sharing(verdicts: Sequence[Verdict]) -> str | None:
    """Return how far most exact variants share; the furthest of ties, None if none is exact."""
    counts = Counter(verdict.shared for verdict in verdicts if verdict.verdict == EXACT)
    return max(sorted(counts, key=ORDER.index), key=counts.__getitem__, default=None)


if __name__ == "__main__":
    sys.exit(main())
