"""The verdicts on all variants, kept in `docs/families.csv`, and the pages that are made of them.

`make families` examines each variant whose verdict is missing or of other code, a row at a time, so
that it goes on where it was stopped: on another day, in another checkout that has the file.
"""

from __future__ import annotations

import ast
import csv
import io
import multiprocessing
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
    config_class,
    families,
    variants,
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
from tracker.core.provenance import content_hash
from tracker.ledger.files import write_text

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "families.csv"
PAGE = KEPT.with_suffix(".md")
IN_SHORT = PAGE.with_name("models.md")
PROCESSES = 2
COLUMNS = ("family", "variant", "verdict", "shared", "difference", "idle", "why", "state")

HEAD = """\
# Families

This page is generated: `make families` measures and writes it. [families.csv](families.csv) has
each variant by itself. It holds {held:,} of {every:,} variants, measured with {states}
of the code, of torch and of transformers ({version}).

Every causal language model of the installed transformers, tiny and random, in variants of its
windows, chunks, kinds of layers, rotary positions and switches. Each is measured by the engine, in
two orders of documents of many lengths, and compared with one plain forward pass a request of the
checkpoint without the layer that `tracker export` writes, as transformers loads it; where there is
none, which [families.csv](families.csv) says, of the model whose layer hands on its input.

**{counts}.** Another {others} settings are not accepted by their classes.

- *Shared*, exactly: over *documents* (their common beginning is read once), *tokens*
  (what a document's requests have in common is read once), *depth* (layers below the
  removed one run once) or *nothing*. Variants are named that share unlike most.
- *Exact to*: the largest difference from the truth, in nats.
- *Discontinuous*: a router or a top-k flips within float32's rounding; in float64 the
  same model is exact.

"""
FAR = {
    "documents": "over depth, over tokens, and what documents have in common",
    "tokens": "over depth and tokens",
    "depth": "over depth",
    "nothing": "nothing: one plain pass a request",
    "–": "refused by name",
}
BEGIN, END = "<!-- made by `make families` -->\n", "\n<!-- end -->"


def state() -> str:
    """Name the code that measures and is measured, and what computes."""
    measured = [
        path for room in ("engine", "models") for path in (ROOT / "tracker" / room).rglob("*.py")
    ]
    measuring = [
        ROOT / "tests" / f"{name}.py"
        for name in ("tools/survey", "helpers/registry", "helpers/engines")
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
    ) + table(verdicts)


def table(verdicts: Sequence[Verdict]) -> str:
    """Merge the variants of each family, and list what is not built."""
    lines = ["| family | shared | exact to | else |", "|---|---|---|---|"]
    lines += [_row(family, own) for family, own in _by_family(verdicts).items()]
    lines += ["", "## Not built", "", "| family | why |", "|---|---|"]
    lines += [
        f"| {family} | {NOT_BUILT[family]} |" for family in FAMILY_NAMES if family in NOT_BUILT
    ]
    return "\n".join(lines) + "\n"


def _row(family: str, verdicts: Sequence[Verdict]) -> str:
    exact = [one for one in verdicts if one.verdict == EXACT]
    most = _most(verdicts)
    shared = [
        how
        if how == most
        else f"{how}: {', '.join(one.variant.name for one in exact if one.shared == how)}"
        for how in sorted({one.shared for one in exact}, key=lambda how: (how != most, how))
    ]
    besides: dict[str, list[str]] = {}
    for one in verdicts:
        if one.verdict not in (EXACT, NO_VARIANT):
            far = "" if one.verdict == REFUSED else f" by {one.difference:.2g} nats"
            said = f"{one.verdict}{far}" + (f" ({one.why})" if one.verdict == REFUSED else "")
            besides.setdefault(said, []).append(one.variant.name)
    cells = (
        f"{family} ({config_class(family).__name__})",
        "; ".join(shared) or "–",
        f"{max(one.difference for one in exact):.0e}" if exact else "–",
        "; ".join(
            f"{said}: {'all' if len(names) == len(verdicts) else ', '.join(names)}"
            for said, names in besides.items()
        ),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def in_short(verdicts: Sequence[Verdict], every: int) -> str:
    """Say which families share how far, for `docs/models.md`, and whether some are missing."""
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
    lines += ["| shared | families, most of whose variants share so far |", "|---|---|"]
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
    """How far most exact variants share, the furthest of equals; None where none is exact."""
    counts = Counter(one.shared for one in verdicts if one.verdict == EXACT)
    return max(sorted(counts, key=ORDER.index), key=counts.__getitem__, default=None)


if __name__ == "__main__":
    sys.exit(main())
