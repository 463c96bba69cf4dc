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

from tracker.core.errors import TrackerError
from tracker.core.records import CellRecord
from tracker.ledger.store import Ledger
from tracker.measuring.derive import all_records

KEPT = Path(__file__).parents[1] / "ledger" / "kept"
"""A folder of two views over three shards, as tracker wrote it, and the records that follow."""
EXPERIMENT = "method: grid  # as it was run\n"


def make(root: Path) -> Path:
    """Make a results folder with everything in it that a folder may hold."""
    shutil.copytree(KEPT, root, ignore=shutil.ignore_patterns("records.json"))
    ledger = Ledger.existing(root)
    ledger.keep_experiment("demo.yaml", EXPERIMENT)
    (cell,) = ledger.cells()
    ledger.cell(cell.identity.model, cell.identity.benchmark, {})
    ledger.remember("f" * 64, cell)
    cell.add_receipt("mlflow", record="digest", location="http://there")
    seen(root)
    return root


def files(root: Path) -> list[Path]:
    """List what a fault may hit: all but the locks."""
    found = (path for path in sorted(root.rglob("*")) if path.is_file())
    return [path for path in found if "locks" not in path.parts]


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what is logged as a warning."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tracker")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


def seen(root: Path) -> tuple[Any, list[str]]:
    """Look at a folder as `ls`, `report` and `sync` do.

    Returns:
        All output, and the warnings about it. Errors other than tracker's own are raised.
    """
    with listening() as said:
        try:
            ledger = Ledger.existing(root)
            contents = ledger.contents()
            records = all_records(contents)
            found = ledger.find("f" * 64)
            receipts = [cell.receipt("mlflow") for cell in ledger.cells()]
        except TrackerError as error:
            return None, [*said, str(error)]
    said += [f"{path}: {what}" for path, what in contents.damaged.items()]
    shown = (
        [record.model_dump_json() for record in records],
        contents.experiments,
        found and found.folder.name,
        receipts,
    )
    return shown, said


MADE_AGAIN = ("index", "receipts", "checks", "derived", "verified.json")
"""What is not missed when it is damaged: nothing is shown from it that cannot be made again."""


def _but_what_it_took(text: str) -> str:
    unknown = dict.fromkeys(("seconds", "peak_bytes", "measured"))
    return CellRecord.model_validate_json(text).model_copy(update=unknown).model_dump_json()


def silent(root: Path, truth: Any, hit: Path) -> str:
    """Return differences from the truth that are shown without a warning; "" if there are none."""
    shown, said = seen(root)
    if shown == truth or said:
        return ""
    # What measuring took is known of the shards that are there.
    if hit.suffix == ".parquet" and shown is not None:
        shown, truth = (
            ([_but_what_it_took(text) for text in records], *rest)
            for records, *rest in (shown, truth)
        )
    if shown == truth:
        return ""
    # What is gone cannot speak: a view is not shown, a cell lacks documents or runs and says so.
    if not os.path.lexists(root / hit) and all(
        text in truth[0] or not CellRecord.model_validate_json(text).is_complete
        for text in shown[0]
    ):
        return ""
    if shown is not None and any(part in MADE_AGAIN for part in hit.parts):
        # Its place is empty: looked up or published anew, never another's.
        records, experiments, found, receipts = shown
        if (
            (records, experiments) == truth[:2]
            and found in (None, truth[2])
            and all(receipt in ({}, *truth[3]) for receipt in receipts)
        ):
            return ""
    return f"{hit}: shows something else and says nothing"


def flip(path: Path, place: int) -> None:
    """Flip one bit of a file; its time stays, as when a disk rots."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return
    if isinstance(found, dict):
        change(found)
        path.write_text(json.dumps(found))


def _swap(path: Path) -> None:
    others = sorted(other for other in path.parent.glob(f"*{path.suffix}") if other != path)
    if others:
        mine, theirs = path.read_bytes(), others[0].read_bytes()
        path.write_bytes(theirs)
        others[0].write_bytes(mine)


def _replace(path: Path, make_it: Callable[[], object]) -> None:
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
    "unknown field": lambda path: _json(path, lambda found: found.update(unknown=1)),
    "no digest": lambda path: _json(path, lambda found: found.pop("digest", None)),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: _replace(path, path.mkdir),
    "a dangling link": lambda path: _replace(path, lambda: path.symlink_to("nowhere")),
    "swapped": _swap,
}
"""What is done to a file, by name."""
