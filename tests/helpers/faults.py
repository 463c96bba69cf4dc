"""Faults of a results folder on its disk, and the output allowed afterwards."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracker.ledger.store import Ledger
from tracker.measuring.derive import list_records
from tracker.schema.errors import TrackerError
from tracker.schema.records import CellRecord

KEPT_FOLDER = Path(__file__).parents[1] / "ledger" / "kept"
"""A folder of two views over three shards, as tracker wrote it, and the records that follow."""
EXPERIMENT = "method: grid  # as it was run\n"


def make_results(root: Path) -> Path:
    """Make a results folder with everything in it that a folder may hold."""
    shutil.copytree(KEPT_FOLDER, root, ignore=shutil.ignore_patterns("records.json"))
    ledger = Ledger.open_existing(root)
    ledger.write_experiment("demo.yaml", EXPERIMENT)
    (cell,) = ledger.cells()
    ledger.open_cell(cell.identity.model, cell.identity.benchmark, {})
    ledger.index_cell("f" * 64, cell)
    cell.add_receipt("mlflow", record="digest", location="http://there")
    show_results(root)
    return root


def damageable_files(root: Path) -> list[Path]:
    """List what a fault may hit: all but the locks."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    return [path for path in paths if "locks" not in path.parts]


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect what is logged as a warning."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tracker")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def show_results(root: Path) -> tuple[Any, list[str]]:
    """Look at a folder as `ls`, `report` and `sync` do.

    Returns:
        All output, and the warnings about it. Errors other than tracker's own are raised.
    """
    with collect_warnings() as messages:
        try:
            ledger = Ledger.open_existing(root)
            contents = ledger.contents()
            records = list_records(contents)
            cell = ledger.find("f" * 64)
            receipts = [store.receipt("mlflow") for store in ledger.cells()]
        except TrackerError as error:
            return None, [*messages, str(error)]
    messages += [f"{path}: {problem}" for path, problem in contents.damaged.items()]
    texts = [record.model_dump_json() for record in records]
    return (texts, contents.experiments, cell and cell.folder.name, receipts), messages


DERIVED_PARTS = ("index", "receipts", "checks", "derived", "verified.json")
"""What is not missed when it is damaged: nothing is shown from it that cannot be made again."""


def _without_costs(text: str) -> str:
    unknown = dict.fromkeys(("seconds", "outcome_seconds", "peak_bytes", "measured"))
    return CellRecord.model_validate_json(text).model_copy(update=unknown).model_dump_json()


def silent_difference(root: Path, truth: Any, damaged_path: Path) -> str:
    """Return differences from the truth that are shown without a warning; "" if there are none."""
    output, messages = show_results(root)
    if output == truth or messages:
        return ""
    # What measuring took is known of the shards that are there.
    if damaged_path.suffix == ".parquet" and output is not None:
        output, truth = (
            ([*map(_without_costs, records)], *others) for records, *others in (output, truth)
        )
    if output == truth:
        return ""
    # What is gone cannot speak: a view is not shown, a cell lacks documents or runs and says so.
    if not os.path.lexists(root / damaged_path):
        new = (CellRecord.model_validate_json(text) for text in output[0] if text not in truth[0])
        if not any(record.is_complete for record in new):
            return ""
    if output is not None and {*damaged_path.parts} & {*DERIVED_PARTS}:
        # Its place is empty: looked up or published anew, never another's.
        records, experiments, cell, receipts = output
        is_same = (records, experiments) == truth[:2] and cell in (None, truth[2])
        if is_same and all(receipt in ({}, *truth[3]) for receipt in receipts):
            return ""
    return f"{damaged_path}: shows something else and says nothing"


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file; its time stays, as when a disk rots."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _change_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    try:
        entry = json.loads(path.read_text())
    except ValueError:
        return
    if isinstance(entry, dict):
        change(entry)
        path.write_text(json.dumps(entry))


def _swap_files(path: Path) -> None:
    others = sorted({*path.parent.glob(f"*{path.suffix}")} - {path})
    if others:
        first, second = path.read_bytes(), others[0].read_bytes()
        path.write_bytes(second)
        others[0].write_bytes(first)


def _replace_file(path: Path, make_it: Callable[[], object]) -> None:
    path.unlink()
    make_it()


FAULTS: dict[str, Callable[[Path], object]] = {
    "binary": lambda path: path.write_bytes(random.Random(0).randbytes(300)),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\0more"),
    "latin-1": lambda path: path.write_bytes("größe: ä".encode("latin-1")),
    "a list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "huge number": lambda path: path.write_text('{"format": 1e999, "key": ' + "9" * 5000 + "}"),
    "unknown field": lambda path: _change_json(path, lambda content: content.update(unknown=1)),
    "no digest": lambda path: _change_json(path, lambda content: content.pop("digest", None)),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: _replace_file(path, path.mkdir),
    "a dangling link": lambda path: _replace_file(path, lambda: path.symlink_to("nowhere")),
    "swapped": _swap_files,
}
"""What is done to a file, by name."""
