"""Verify a results folder, and compare two copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tracker.ledger.cells import CellStore
from tracker.ledger.files import closed, reason, unsealed
from tracker.ledger.outcomes import PROVENANCE
from tracker.ledger.shards import ASIDE, Shard, read_observed
from tracker.ledger.store import Ledger

_NOTES = (
    *(f"{folder}/*.json" for folder in ("index", "checks", "formats", "places", "pulled")),
    "searches/timing/*.json",
    *(f"cells/*/{notes}.json" for notes in ("derived/*", "receipts/*", "begun/*", "verified")),
)
"""Patterns of notes that are created again if they are damaged."""
_ASIDE = (
    "it was set aside as damaged; run its experiment again, which measures what is missing, and "
    "delete it"
)
_LOST = "it is gone; run its experiment again, which measures what is missing"
_NO_TEXTS = (
    "it was set aside as damaged; its documents are named by their numbers, and no outcome is "
    "touched; delete it"
)


@dataclass(frozen=True)
class VerifiedCell:
    """A cell after all its shards were read.

    Attributes:
        shards: Number of intact shards.
        documents: Number of documents with outcomes.
        outcomes: Number of outcomes, one per document and ablation.
        aside: Number of shards that were set aside, now or before.
    """

    store: CellStore
    shards: int
    documents: int
    outcomes: int
    aside: int


@dataclass
class Verified:
    """Result of verifying a results folder: its usable cells and its damaged files.

    `damaged` maps each damaged file or folder to what to do about it.
    """

    cells: list[VerifiedCell] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


def verify(ledger: Ledger, progress: Callable[[int], None] = lambda cells: None) -> Verified:
    """Read and verify all of a results folder, without using earlier verifications.

    A damaged shard is set aside, as always when it is read. `progress` is called with the number of
    cells done since the last call.
    """
    found = Verified(damaged=dict(ledger.contents().damaged))
    for store in ledger.cells():
        shards = [shard for path in store.shards() if (shard := store.shard(path)) is not None]
        held = {row for shard in shards for row in _places(shard)}
        aside = sorted(store.folder.glob(f"shards/*{ASIDE}"))
        documents = len({(task, doc) for task, doc, _ in held})
        found.cells.append(VerifiedCell(store, len(shards), documents, len(held), len(aside)))
        store.read(columns=["doc"])
        lost = [store.folder / "shards" / name for name in store.lost()]
        store.texts.read()
        texts = sorted(store.folder.glob(f"texts/*{ASIDE}"))
        found.damaged |= {str(path): why for path in store.texts.files() if (why := closed(path))}
        for path in sorted(store.folder.glob("observed/*/*.parquet")):
            try:
                read_observed(path)
            except (OSError, ValueError) as error:
                found.damaged[str(path)] = (
                    f"{reason(error)}; it is not believed, and observed again when it is needed"
                )
        for paths, what in ((aside, _ASIDE), (lost, _LOST), (texts, _NO_TEXTS)):
            found.damaged |= dict.fromkeys(map(str, paths), what)
        found.damaged |= store.mixed
        progress(1)
    for pattern in _NOTES:
        for path in sorted(ledger.root.glob(pattern)):
            try:
                unsealed(path.read_bytes(), path.name)
            except (OSError, ValueError) as error:
                found.damaged[str(path)] = (
                    f"{reason(error)}; it is not believed, and made again when it is needed"
                )
    return found


def _places(shard: Shard) -> Iterator[tuple[str, int, str]]:
    columns = shard.table.select(["task", "doc", "ablation"]).to_pydict()
    return zip(*columns.values(), strict=True)


def compare(ledger: Ledger, other: Ledger) -> Iterator[str]:
    """Compare two copies of a results folder by outcomes; yield differences as sentences."""
    mine, theirs = ({cell.identity.key: cell for cell in each.cells()} for each in (ledger, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if key not in mine or key not in theirs:
            store = mine.get(key) or theirs[key]
            yield f"{store.folder.name}: only in {(ledger if key in mine else other).root}"
            continue
        pair = (mine[key], theirs[key])
        name = pair[0].folder.name
        if pair[0].identity != pair[1].identity:
            yield f"{name}: the two cell.json differ"
        asked, too = (
            {(store.views.name_of(v.view), v.view.runs) for v in store.views.asked({})}
            for store in pair
        )
        if asked != too:
            yield f"{name}: not the same was asked of the two"
        one, two = (_outcomes(store) for store in pair)
        for root, only in ((ledger.root, one.keys() - two), (other.root, two.keys() - one)):
            if only:
                yield f"{name}: {len(only)} outcomes are only in {root}"
        differing = [place for place in one.keys() & two if one[place] != two[place]]
        says, other_says = (store.texts.read() for store in pair)
        unlike = [place for place in says.keys() & other_says if says[place] != other_says[place]]
        if unlike:
            task, doc = min(unlike)
            yield f"{name}: the texts of {len(unlike)} documents differ, document {doc} of {task}"
        if differing:
            task, doc, ablation = min(differing)
            yield (
                f"{name}: {len(differing)} outcomes differ, that of document {doc} of {task} "
                f"under {ablation} among them"
            )


def _outcomes(store: CellStore) -> dict[tuple[str, int, str], str]:
    """Return each outcome as text, so that equal ones compare as equal even with NaN values."""
    found = {}
    for row in store.read().to_dict("records"):
        place = (str(row.pop("task")), int(row.pop("doc")), str(row.pop("ablation")))
        row.pop(PROVENANCE)
        found[place] = repr(sorted((name, _plain(value)) for name, value in row.items()))
    return found


def _plain(value: object) -> str:
    return repr(value.tolist() if hasattr(value, "tolist") else value)
