"""Verify a results folder, and compare two copies of a results folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tracker.ledger.cells import SHARD_SET_ASIDE, CellStore
from tracker.ledger.files import access_problem, error_reason, parse_note
from tracker.ledger.outcomes import PROVENANCE_COLUMN
from tracker.ledger.shards import ASIDE_SUFFIX, Shard, read_observation_file
from tracker.ledger.store import Ledger

_NOTES = (
    *(f"{folder}/*.json" for folder in ("index", "checks", "formats", "places", "pulled")),
    "searches/timing/*.json",
    *(f"cells/*/{notes}.json" for notes in ("derived/*", "receipts/*", "begun/*", "verified")),
)
"""Patterns of the paths of notes that are created again if they are damaged."""
_LOST = "the file is missing; run the experiment again to measure the missing outcomes"
_NO_TEXTS = (
    "the damaged file of texts was renamed, and no outcome is affected; delete the renamed file"
)


@dataclass(frozen=True)
class VerifiedCell:
    """Result of verifying a cell (the results of a model on a benchmark).

    Attributes:
        shards: Number of intact files of outcomes (shards).
        documents: Number of documents with outcomes.
        outcomes: Number of outcomes, one per document and ablation.
        aside: Number of damaged shards, which were renamed.
    """

    store: CellStore
    shards: int
    documents: int
    outcomes: int
    aside: int


@dataclass
class Verification:
    """Result of verifying a results folder: its usable cells and its damaged files.

    `damaged` maps each damaged file or folder to a message that says what to do.
    """

    cells: list[VerifiedCell] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


def verify_ledger(
    ledger: Ledger, progress: Callable[[int], None] = lambda cells: None
) -> Verification:
    """Read and verify all files of a results folder.

    Damaged shards are renamed. `progress` is called with the number of newly verified cells.
    """
    result = Verification(damaged=dict(ledger.contents().damaged))
    for store in ledger.cells():
        shards = [s for path in store.shards() if (s := store.load_shard(path)) is not None]
        keys = {key for shard in shards for key in _outcome_keys(shard)}
        aside_paths = sorted(store.folder.glob(f"shards/*{ASIDE_SUFFIX}"))
        n_documents = len({(task, doc) for task, doc, _ in keys})
        counts = (len(shards), n_documents, len(keys), len(aside_paths))
        result.cells.append(VerifiedCell(store, *counts))
        # Reading sets damaged files aside and finds mixed shards, which are reported below.
        store.read(columns=["doc"])
        store.texts.read()
        lost_paths = [store.folder / "shards" / name for name in store.lost_shards()]
        text_paths = sorted(store.folder.glob(f"texts/*{ASIDE_SUFFIX}"))
        problems = {str(path): access_problem(path) for path in store.texts.files()}
        result.damaged |= {path: problem for path, problem in problems.items() if problem}
        for path in sorted(store.folder.glob("observed/*/*.parquet")):
            result.damaged |= _check_file(path, read_observation_file)
        for paths, message in (
            (aside_paths, SHARD_SET_ASIDE),
            (lost_paths, _LOST),
            (text_paths, _NO_TEXTS),
        ):
            result.damaged |= dict.fromkeys(map(str, paths), message)
        result.damaged |= store.mixed
        progress(1)
    for pattern in _NOTES:
        for path in sorted(ledger.root.glob(pattern)):
            result.damaged |= _check_file(path, _read_note)
    return result


def _check_file(path: Path, read: Callable[[Path], object]) -> dict[str, str]:
    """Verify a file, and return a message for the user if the file is damaged.

    `read` raises OSError or ValueError on damage. Returns {path: message}, or {} for an intact
    file. The message says that tracker creates the file again.
    """
    try:
        read(path)
    except (OSError, ValueError) as error:
        reason = error_reason(error)
        message = f"the file is ignored ({reason}); tracker creates it again when it is needed"
        return {str(path): message}
    return {}


def _read_note(path: Path) -> dict[str, object]:
    return parse_note(path.read_bytes(), path.name)


def _outcome_keys(shard: Shard) -> Iterator[tuple[str, int, str]]:
    columns = shard.table.select(["task", "doc", "ablation"]).to_pydict()
    return zip(*columns.values(), strict=True)


def compare_ledgers(ledger: Ledger, other_ledger: Ledger) -> Iterator[str]:
    """Yield sentences that describe how two copies of a results folder differ."""
    ledgers = (ledger, other_ledger)
    own_cells, other_cells = ({c.identity.key: c for c in copy.cells()} for copy in ledgers)
    for key in sorted(own_cells.keys() | other_cells.keys()):
        if key in own_cells and key in other_cells:
            name = own_cells[key].folder.name
            for difference in _cell_differences(own_cells[key], other_cells[key]):
                yield f"{name}: {difference}"
        else:
            root = (ledger if key in own_cells else other_ledger).root
            yield f"{(own_cells | other_cells)[key].folder.name}: only in {root}"


def _cell_differences(*stores: CellStore) -> Iterator[str]:
    """Yield sentences that describe how two copies of a cell differ from each other."""
    if stores[0].identity != stores[1].identity:
        yield "the two cell.json differ"
    views, other_views = (
        {(store.views.view_name(v.view), v.view.runs) for v in store.views.read_requested({})}
        for store in stores
    )
    if views != other_views:
        yield "different runs were requested in the two folders"
    outcomes, other_outcomes = map(_outcomes, stores)
    lone_keys = (outcomes.keys() - other_outcomes, other_outcomes.keys() - outcomes)
    for store, keys in zip(stores, lone_keys, strict=True):
        if keys:
            yield f"{len(keys)} outcomes are only in the results folder {store.folder.parents[1]}"
    texts, other_texts = (store.texts.read() for store in stores)
    if documents := [key for key in texts.keys() & other_texts if texts[key] != other_texts[key]]:
        task, doc = min(documents)
        yield (
            f"the texts of {len(documents)} documents differ between the two folders, such as "
            f"document {doc} of {task}"
        )
    shared_keys = outcomes.keys() & other_outcomes
    if differing := [key for key in shared_keys if outcomes[key] != other_outcomes[key]]:
        task, doc, ablation = min(differing)
        yield (
            f"{len(differing)} outcomes differ between the two folders, such as the outcome of "
            f"document {doc} of {task} with ablation {ablation}"
        )


def _outcomes(store: CellStore) -> dict[tuple[str, int, str], str]:
    """Read a cell's outcomes as text, to compare outcomes even if values are NaN.

    Returns (task, document number, ablation name) → text of all values.
    """
    outcomes = {}
    for row in store.read().to_dict("records"):
        key = (str(row.pop("task")), int(row.pop("doc")), str(row.pop("ablation")))
        row.pop(PROVENANCE_COLUMN)
        # NumPy prints long lists with dots, so that different ones look alike.
        values = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in row.items()}
        outcomes[key] = repr(sorted((name, repr(value)) for name, value in values.items()))
    return outcomes
