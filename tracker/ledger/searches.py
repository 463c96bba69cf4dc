"""What searches found, in the results folder: `searches/NAME.json`."""

from __future__ import annotations

from pathlib import Path

from tracker.core.prune_records import PruneRecord
from tracker.ledger.notes import reason, unsealed, write_note


def keep_search(root: Path, record: PruneRecord) -> Path:
    """Keep a search in a results folder, in place of what it found before; its file."""
    path = root / "searches" / f"{record.name}.json"
    write_note(path, record.model_dump(mode="json"))
    return path


def read_search(path: Path) -> PruneRecord:
    """Read a search's file; ValueError or OSError if it is none, or not what was written."""
    return PruneRecord.model_validate(unsealed(path.read_bytes()))


def searches(root: Path, damaged: dict[str, str]) -> list[PruneRecord]:
    """List what is kept, by name; `damaged` gets each file that cannot be used → what to do."""
    found = []
    for path in sorted(root.glob("searches/*.json")):
        try:
            found.append(read_search(path))
        except (OSError, ValueError) as error:
            damaged[str(path)] = f"{reason(error)}; type its `tracker prune` again, or delete it"
    return found
