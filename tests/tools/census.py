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

from tests.helpers.registry import (
    FAMILY_NAMES,
    NOT_BUILT,
    Variant,
    families,
)
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
    examine,
    prepare,
)
from tests.tools.variants import variants
from tracker.core.provenance import content_hash
from tracker.ledger.files import write_text

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "families.csv"
PAGE = KEPT.with_suffix(".md")
IN_SHORT = PAGE.with_name("models.md")
PROCESSES = 2
COLUMNS = ("family", "variant", "verdict", "shared", "difference", "idle", "why", "state")

HEAD = """\
# All model families

This page shows how much computation `tracker` shares for each model family of transformers, and
how exact the result is. `make families` measures and writes it, and the table of
[Supported models](models.md). [families.csv](families.csv) has each variant.

It holds {held:,} of {every:,} variants, measured with {states} of the code, of torch and of
transformers ({version}). They are tiny random models with different windows, chunks, layer kinds,
rotary positions and other settings. The engine measures each in two orders of documents of many
lengths. The reference is one plain forward pass per request through the checkpoint without the
layer, as `tracker export` writes it. If there is no such checkpoint ([families.csv](families.csv)
shows where), the layer of the reference returns its input.

**{counts}.** Another {others} settings are not accepted by their classes. No exact variant differs
from the reference by more than {largest:.1g} nats.

| shared | computed once |
|---|---|
| `documents` | prefixes common to all documents, and `tokens` |
| `tokens` | prefixes common to a document's requests, and `depth` |
| `depth` | layers below the removed one |

The table lists families whose variants differ in what they share, or are refused. Variants are
*discontinuous* if float32 rounding changes a router's or a top-k choice; float64 is exact then.

"""
FAR = {
    "documents": "over depth, tokens and documents",
    "tokens": "over depth and tokens",
    "depth": "over depth",
    "nothing": "nothing: one plain pass per request",
    "–": "refused",
}
MANY = 4
"""As many variants are counted, not named."""
BEGIN, END = "<!-- made by `make families` -->\n", "\n<!-- end -->"


def state() -> str:
    """Name the code that measures and is measured, and what computes."""
    measured = [
        path for room in ("engine", "models") for path in (ROOT / "tracker" / room).rglob("*.py")
    ]
    measuring = [
        ROOT / "tests" / f"{name}.py"
        for name in ("tools/survey", "tools/variants", "helpers/registry", "helpers/engines")
    ]
    code = {
        str(path.relative_to(ROOT)): without_comments(path.read_text())
        for path in (*measured, *measuring)
    }
    return content_hash([code, torch.__version__, transformers.__version__])[:8]


class _NoDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def without_comments(module: str) -> str:
    """Write a module without its comments and docstrings, which change no verdict."""
    return ast.unparse(_NoDocstrings().visit(ast.parse(module)))


def read(path: Path = KEPT) -> list[Verdict]:
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


def keep(verdicts: Sequence[Verdict], path: Path = KEPT) -> None:
    """Write all verdicts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in sorted(verdicts, key=lambda one: str(one.variant)):
        far, idle = f"{each.difference:.1e}", " ".join(map(str, each.idle))
        of = (each.variant.family, each.variant.name)
        writer.writerow([*of, each.verdict, each.shared, far, idle, each.why, each.state])
    write_text(path, text.getvalue())


def main() -> int:
    """Examine every variant, or those of the families that are typed; print a line each."""
    wanted = sys.argv[1:] or families()
    if unknown := set(wanted) - set(families()):
        print(f"no family of docs/families.md: {', '.join(sorted(unknown))}")  # noqa: T201
        return 2
    now, every = state(), [variant for family in families() for variant in variants(family)]
    todo = [variant for variant in every if variant.family in wanted]
    before = {str(each.variant): each for each in read()}
    known = {name: before[name] for name in map(str, every) if name in before}
    left = left_of(todo, [*known.values()], now)
    print(f"{len(todo) - len(left)} of {len(todo)} are known")  # noqa: T201
    with multiprocessing.get_context("spawn").Pool(PROCESSES, prepare) as pool:
        try:
            for count, verdict in enumerate(pool.imap_unordered(examine, left), 1):
                known[str(verdict.variant)] = replace(verdict, state=now)
                keep([*known.values()])
                print(f"{count}/{len(left)} {verdict}", flush=True)  # noqa: T201
        except KeyboardInterrupt:
            pool.terminate()
            print("stopped; the same command goes on")  # noqa: T201
    write_pages(read(), len(every))  # as they were kept, so that the file alone makes the pages
    found = [known[name] for name in map(str, todo) if name in known]
    for name, number in Counter(one.verdict for one in found).most_common():
        print(f"{name}: {number}")  # noqa: T201
    if sum(one.state == now for one in found) < len(todo):
        return 130
    return int(any(one.verdict in FAILURES for one in found))


def left_of(todo: Sequence[Variant], known: Sequence[Verdict], now: str) -> list[Variant]:
    """Find what is to be examined: what is not known of this state, and what failed."""
    holds = {
        str(each.variant) for each in known if each.state == now and each.verdict not in FAILURES
    }
    return [variant for variant in todo if str(variant) not in holds]


def write_pages(verdicts: Sequence[Verdict], every: int) -> None:
    """Write the page, and the short table into `docs/models.md`."""
    write_text(PAGE, page(verdicts, every))
    before, _, rest = IN_SHORT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(IN_SHORT, before + BEGIN + in_short(verdicts, every) + END + after)


def page(verdicts: Sequence[Verdict], every: int) -> str:
    """Write the page of so many variants: their number by verdict, and the table."""
    counts = Counter(one.verdict for one in verdicts)
    states = len({one.state for one in verdicts})
    return HEAD.format(
        held=len(verdicts),
        every=every,
        states="one state" if states == 1 else f"{states} states",
        version=transformers.__version__,
        counts=f"exact: {counts[EXACT]}, refused: {counts[REFUSED]}, discontinuous: "
        f"{counts[DISCONTINUOUS]}, silently wrong: {counts[WRONG]}, crashed: {counts[CRASH]}",
        others=counts[NO_VARIANT],
        largest=max((one.difference for one in verdicts if one.verdict == EXACT), default=0),
    ) + table(verdicts)


def table(verdicts: Sequence[Verdict]) -> str:
    """Merge the variants of each family, and list what is not built."""
    families: dict[tuple[str, str], list[str]] = {}
    for family, of_family in _by_family(verdicts).items():
        shared, refused = _columns(of_family)
        if ";" in shared or refused:
            families.setdefault((shared, refused), []).append(family)
    lines = ["| families | shared | not exact |", "|---|---|---|"]
    lines += [
        f"| {', '.join(names)} | {shared} | {refused} |"
        for (shared, refused), names in families.items()
    ]
    reasons: dict[str, list[str]] = {}
    for family in FAMILY_NAMES:
        if family in NOT_BUILT:
            reasons.setdefault(NOT_BUILT[family], []).append(family)
    lines += ["", "## Not built", "", "| reason | families |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


def _columns(verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """Return how far a family shares, and its variants that are not exact."""
    exact = [one for one in verdicts if one.verdict == EXACT]
    most = _most(verdicts)
    shared = [] if most is None else [most]
    for how in sorted({one.shared for one in exact} - {most}):
        names = [one.variant.name for one in exact if one.shared == how]
        shared.append(f"{how}: {_listed(names, len(verdicts))}")
    besides: dict[str, list[str]] = {}
    for one in verdicts:
        if one.verdict not in (EXACT, NO_VARIANT):
            far = "" if one.verdict == REFUSED else f" by {one.difference:.2g} nats"
            why = f" ({_brief(one.why)})" if one.verdict == REFUSED else ""
            said = f"{one.verdict}{far}{why}"
            besides.setdefault(said, []).append(one.variant.name)
    refused = "; ".join(
        f"{said}: {_listed(names, len(verdicts))}" for said, names in besides.items()
    )
    return "; ".join(shared) or "–", refused.replace("|", "\\|")


def _brief(reason: str) -> str:
    """Return the first clause of an error, without its type and the model's class."""
    message = re.sub(r"^\w+Error: (\w+For\w+:? )?", "", reason)
    return re.split(r"[:;] | \(", message)[0]


def _listed(names: Sequence[str], total: int) -> str:
    """Name a few variants, and count many."""
    if len(names) == total:
        return "all"
    return ", ".join(names) if len(names) < MANY else f"{len(names)} of {total} variants"


def in_short(verdicts: Sequence[Verdict], every: int) -> str:
    """Summarise how far families share, for `docs/models.md`, and whether some are missing."""
    far: dict[str, dict[str, None]] = {place: {} for place in FAR}
    for family, own in _by_family(verdicts).items():
        far[_most(own) or "–"][family.removesuffix("_text")] = None
    lines = []
    if len(verdicts) < every:
        lines = [
            f"{len(verdicts):,} of {every:,} variants so far; a family that is not named is held",
            "against the truth before each cell like all others.",
            "",
        ]
    lines += ["| shared | families (by most of their variants) |", "|---|---|"]
    lines += [
        f"| {FAR[place]} | {len(names)}: {', '.join(names) or 'none'} |"
        for place, names in far.items()
    ]
    return "\n".join(lines)


def _by_family(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for one in sorted(verdicts, key=lambda one: str(one.variant)):
        found.setdefault(one.variant.family, []).append(one)
    return found


def _most(verdicts: Sequence[Verdict]) -> str | None:
    """Return how far most exact variants share; the furthest of ties, None if none is exact."""
    counts = Counter(one.shared for one in verdicts if one.verdict == EXACT)
    return max(sorted(counts, key=ORDER.index), key=counts.__getitem__, default=None)


if __name__ == "__main__":
    sys.exit(main())
