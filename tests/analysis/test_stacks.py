"""Outcomes of different versions or devices are reported, and never compared silently."""

from __future__ import annotations

from collections.abc import Sequence

from tests.helpers.stored_cells import cell_record, layer_request, make_row, write_rows_to_blocks
from tracker.ledger.cells import CellStore
from tracker.report.tables import layer_table
from tracker.report.wording import warnings
from tracker.schema.records import CellRecord
from tracker.tracking.runs import describe_run

OLD = {"torch": "2.12.0", "platform": "Linux x86_64", "device": "cpu", "cores": "2"}
NEW = {**OLD, "torch": "2.13.0", "cores": "64"}
GPU = {**NEW, "device": "cuda:1"}
DIFFERENT = "the outcomes were measured with different software versions or devices"

NAMES = ("baseline", "layer:0", "layer:1")


def measure(
    cell: CellStore, documents: Sequence[int], names: Sequence[str], stack: dict[str, str]
) -> None:
    rows = [make_row(doc, name) for doc in documents for name in names]
    write_rows_to_blocks(cell, rows, provenance=stack)


def record(cell: CellStore, layers: Sequence[int] = (0, 1), limit: int = 4) -> CellRecord:
    return cell_record(cell, layer_request(*layers, limit=limit))


def test_one_stack_is_what_the_shards_say(cell):
    """Was: the versions of whoever made the cell, whatever measured it."""
    assert cell.identity.provenance == {"numpy": "2.4"}
    measure(cell, range(4), NAMES, NEW)
    derived = record(cell)
    assert derived.provenance == NEW
    assert derived.mismatch is None
    assert all(run.mismatch is None for run in derived.runs)


def test_only_what_is_shown_counts(cell):
    measure(cell, range(4), NAMES, OLD)
    measure(cell, range(4), ("layer:2",), NEW)
    measure(cell, range(4, 8), NAMES, NEW)
    assert record(cell).provenance == OLD
    assert record(cell, limit=8).provenance["torch"] == "2.12.0, 2.13.0"
    assert record(cell, (0, 2)).provenance["cores"] == "2, 64"


def test_documents_by_other_versions_are_said_but_each_is_compared_alike(cell):
    measure(cell, range(2), NAMES, OLD)
    measure(cell, range(2, 4), NAMES, NEW)
    derived = record(cell)
    assert derived.mismatch == f"{DIFFERENT}: torch 2.12.0, 2.13.0"
    assert derived.is_complete
    assert not any(run.mismatch for run in derived.runs)
    (warning,) = (line for line in warnings(derived) if DIFFERENT[1:] in line)
    assert "torch 2.12.0, 2.13.0. Each accuracy drop compares" in warning


def test_a_baseline_is_not_compared_with_another_stacks_ablation_in_silence(cell):
    measure(cell, range(4), ("baseline", "layer:0"), OLD)
    measure(cell, range(1), ("layer:1",), OLD)
    measure(cell, range(1, 3), ("layer:1",), NEW)
    measure(cell, range(3, 4), ("layer:1",), GPU)
    derived = record(cell)
    assert derived.mismatch == f"{DIFFERENT}: torch 2.12.0, 2.13.0; device cpu, cuda"
    same_stack, mixed_stacks = derived.runs
    assert same_stack.mismatch is None
    reason = (
        "for 3 of 4 documents, the baseline and the ablation were measured with different software "
        "versions or devices: torch 2.12.0, 2.13.0; device cpu, cuda"
    )
    assert mixed_stacks.mismatch == reason
    # On the page, and in the runs.
    assert any("differ from those of the baseline for layer 1." in w for w in warnings(derived))
    assert f"Layer 1: {reason}." in layer_table(derived).notes
    assert describe_run(derived, mixed_stacks).reasons["provenance"] == reason
